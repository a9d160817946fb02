"""The control API (SPEC §11): one typed route table, served by aiohttp and described by OpenAPI 3.1."""
