"""HTTP servers under limits: what the control API and the gateway are both served with."""
