"""What a worker's reply means to who waits for it."""

from __future__ import annotations

from models import JobTooLong, ModelFailed
from service.errors import BadRequest, BodyTooLarge, DeadlineExceeded, DocumentTooLong, Overloaded
from service.fleet.messages import ScoreReply, TooLong
from service.fleet.router import Scored, Ticket
from service.processes.wire import Failure, FrameTooLarge, WireError


def answer(ticket: Ticket, reply: object, worker: int) -> None:
    """Tell who waits for `ticket`, if anybody still does. `reply` may also be why it could not be sent."""
    if not ticket.waits:
        return
    if isinstance(reply, ScoreReply) and len(reply.scores.margins) == len(ticket.job.candidates):
        queue_ms = (ticket.sent_s - ticket.arrived_s) * 1000
        retried = ticket.attempts > 1
        ticket.answer.set_result(Scored(reply.scores, worker, queue_ms, reply.worker_ms, retried))
    else:
        ticket.fail(_error(reply))


def _error(reply: object) -> Exception:
    match reply:
        case FrameTooLarge():
            return BodyTooLarge("The request's images are too large together.")
        case WireError():
            return BadRequest("The request holds text that is not valid Unicode.")
        case Failure(code="deadline"):
            return DeadlineExceeded()
        case TooLong(index=index, limit_tokens=limit_tokens):
            return DocumentTooLong(index, limit_tokens)
        case Failure(code="memory"):
            return Overloaded("The worker has no memory for this request.", reason="worker_memory")
        case Failure(code="job_too_long", detail=detail):
            return JobTooLong(detail or "The query does not fit into the model's context.")
        case _:  # model_failed, internal, or no sense at all
            return ModelFailed("The model gave no usable score.")
