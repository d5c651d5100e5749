"""lensteer: find, locate, steer and verify behavior directions in reasoning models."""

from lensteer import models
from lensteer.annotation import annotate
from lensteer.behaviors import BEHAVIORS, STEERED, Span
from lensteer.errors import LensteerError
from lensteer.models import load_model
from lensteer.positions import at, everywhere, first, generated, onsets, prompt, sentence_starts, thinking
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task, load_tasks
from lensteer.traces import Trace, generate_traces, load_traces, save_traces
