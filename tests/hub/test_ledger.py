"""How far every edge is: in the optimizer, in a checkpoint begun, in a checkpoint on the disk."""

from __future__ import annotations

from hub.jobs import Place, StepItem
from hub.ledger import Ledger
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import GradGiven, HiddenGiven, Member, Phase, State
from hub.sessions import Session, Sessions
from hub.worker import CheckpointWritten
from messaging.errors import NotFinite
from messaging.messages import Tensor
from messaging.replies import Replies
from tests.support.model_hub import credits_of
