"""The asyncio driver of the lifecycle: one task, inbox and alarm per pool. It decides nothing; core does."""
