"""What every child process of the gateway shares, whatever it computes.

wire.py      dataclasses as frames: a closed vocabulary, no pickle
children.py  the gateway's side: start a child, know that it lives, ask it, end it
parent.py    the child's side: end with the parent, beat, receive, send
sandbox.py   what a child gives up before it touches anybody's data
"""
