"""A witness: a process that cosigns a log's checkpoints as long as the log has only grown (C2SP tlog-witness).

    store.py   its folder: the key, the logs that it knows, what it cosigned last, evidence
    judge.py   what it answers to a checkpoint; the only code that cosigns
    door.py    `POST /add-checkpoint` over HTTP
    __main__   the process

It is worth what its distance from the log is worth: another host, another administrator. It needs no database, reads
none of the service's settings, and loads no code that speaks to one; an import contract holds it to that.
"""
