"""Everything that listens or runs as a process.

__main__.py     the command line; each command calls one function
app.py          create_app: builds every object, lists the middleware, mounts the routers
api/            HTTP: the door, the schemas, the routes
rerank.py       the hot path, and the only file that knows its order
ledger.py       what a decision leaves behind: the hold settled, the entry written
screening/      untrusted images, decoded in child processes
fleet/          workers: one process per tenant
processes/      what every child shares: the wire, the life of a child, the sandbox
watch/          metrics and logs
witness/        a process of its own that cosigns checkpoints of logs
installation.py what one installation keeps on its host
asks.py · settings.py · errors.py
"""

__version__ = "0.1.0"
