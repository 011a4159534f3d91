"""Everything durable: tenants, keys, policies, quotas, the log. No HTTP, no torch; only here is SQL spoken.

errors.py      the error tree; docstrings are the messages
tables.py      the schema as SQLAlchemy sees it (migrations build it, a test compares them)
database.py    provision, migrate, the pools, `transaction(tenant)`: the only commit
guard.py       what a runtime role and a schema must not be, checked before the first request
embedded.py    our own supervisor of the embedded Postgres
policy.py      frozen Policy: a tenant's limits and rights
access.py      keys and identities → Caller; mints TenantId
keys.py        life cycle of API keys; key_text.py: how one is written
kept.py        what was read of them, for a moment
denials.py     tokens and certificates that are denied although they are valid
uses.py        when and from where keys were last used
changes.py     what other gateways changed, heard by LISTEN
key_rights.py  what a key may have, and what may be handed on
key_limits.py  a key's own limits, below its tenant's
directory.py   life cycle of tenants and policies; mints TenantId
sealing.py     secrets wrapped under the master key
quotas.py      hold → settle | release; reap
audit.py       Entry: canonical bytes, fingerprints, append, list
erasure.py     ends what ties entries to people; pruning.py: bodies that go, each under a warrant in the tree
"""
