"""Everything durable: tenants, keys, policies, quotas, the log. No HTTP, no torch; only here is SQL spoken.

errors.py      the error tree; docstrings are the messages
tables.py      the schema as SQLAlchemy sees it (migrations build it, a test compares them)
database.py    provision, migrate, the pools, `transaction(tenant)`: the only commit
guard.py       what a runtime role and a schema must not be, checked before the first request
embedded.py    our own supervisor of the embedded Postgres
policy.py      frozen Policy: a tenant's limits and rights
access.py      API keys → Caller; mints TenantId
key_limits.py  a key's own limits, below its tenant's
directory.py   life cycle of tenants, keys and policies; mints TenantId
sealing.py     secrets wrapped under the master key
quotas.py      hold → settle | release; reap
audit.py       Entry: canonical bytes, fingerprints, append, list
"""
