"""What auditors ask of the log, under `/audit/v1`: entries, their counts, and exports.

A tenant's auditor reads its own tenant's log alone, the platform's auditors and administrators read every one. Each
query is itself an entry.
"""
