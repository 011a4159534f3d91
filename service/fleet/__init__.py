"""Workers: the processes that score, each for one tenant or one group of them.

router.py    the Fleet protocol and what passes through it
seats.py     who sits where: seats, lines, and the rules of giving and taking them
starts.py    what is started, how many at once, and when again after a failure
owner.py     the main of the process that owns a GPU's weights and lends them to workers
ownership.py the gateway's side of it: start, check, replace, outlive the workers
local.py     worker processes of this host: start, assign, retire, replace
diary.py     what the log is told of workers
messages.py  what the gateway and a worker say to each other
replies.py   what a worker's reply means to who waits for it
worker.py    the child's main: load one model, warm up, then read, begin, answer
"""
