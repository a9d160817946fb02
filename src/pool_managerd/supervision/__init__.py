"""The asyncio side of the lifecycle: one task, inbox and timer per pool. It decides nothing; core does."""
