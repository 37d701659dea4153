import pytest

from jaxformer.errors import InputError
from jaxformer.objectives.schedules import Clipped, LogLinear, Polynomial


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polynomial(0.0), "power=0.0 must be above 0"),
        (lambda: Polynomial(-1.0), "power=-1.0 must be above 0"),
        (lambda: LogLinear(1.0), "end=1.0 must be a share that stays seen"),
        (lambda: LogLinear(-0.1), "end=-0.1 must be a share that stays seen"),
        (lambda: Clipped(0.8, 0.3), "low=0.8, high=0.3 must be shares that rise"),
        (lambda: Clipped(-1.0, 2.0), "low=-1.0, high=2.0 must be shares that rise"),
    ],
)
def test_what_is_no_schedule_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()
