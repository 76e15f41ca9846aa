"""The PostgreSQL adapter: the only importer of asyncpg."""
