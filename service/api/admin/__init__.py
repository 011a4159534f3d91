"""What administrators call, under `/admin/v1`: tenants, policies, keys, usage, live work, and the incident switch.

A tenant's administrator sees its own tenant alone, the platform's all of them. To everybody else these paths are
as if there were none, and so are other tenants' ids to a tenant's administrator.
"""
