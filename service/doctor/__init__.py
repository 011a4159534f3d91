"""`python -m service doctor`: what of all that is promised holds on this host, now.

check.py      one check: a name and a look; what a look may find, and what becomes of one that fails
sight.py      what there is to look at: settings, home, the running service, its processes, the database, the log
files.py      who owns what lies on disk, and who may read it
host.py       the kernel, the disk, the limits
processes.py  each process of ours, as the kernel describes it
database.py   roles, row security, durability, backups
log.py        the log's tree, what waits for it, its witnesses
network.py    the running service, and who can reach it by what
deployment.py the model's files, the unit
commands.py   what other commands make sure of: the model's signature, sinks of alerts
examination.py the list of checks, in the order in which they are made
"""
