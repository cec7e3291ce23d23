"Settings by name, however deep; types; and what differs between two runs."
from dataclasses import dataclass, field

import pytest

from diffclip_da.core import UserError
from diffclip_da.settings import as_type, differing, flatten, full_name, homes, override, setting


@dataclass(frozen=True)
class Inner:
    n: int = 1
    seed: int = 0
    name: str = 'x'
    rate: float | None = None

@dataclass(frozen=True)
class Other:
    seed: int = 5
    on: bool = False

@dataclass(frozen=True)
class Outer:
    size: int = 2
    seeds: tuple = (0, 1)
    inner: Inner = field(default_factory=Inner)
    other: Other = field(default_factory=Other)


def test_names_lead_to_their_place():
    assert set(homes(Outer())) == {'size', 'seeds', 'inner__n', 'inner__seed', 'inner__name', 'inner__rate', 'other__seed', 'other__on'}
    assert full_name(Outer(), 'n') == 'inner__n' and setting(Outer(), 'n') == 1 and setting(Outer(), 'other__seed') == 5
    with pytest.raises(UserError, match='say inner__seed or other__seed'): setting(Outer(), 'seed')
    with pytest.raises(UserError, match="no setting 'sized'; there are: size, seeds, n, seed"): setting(Outer(), 'sized')


def test_override_changes_a_copy_and_leaves_the_rest():
    before = Outer()
    got = override(before, n='7', on='true', size=3, rate=1, seeds='4,5', other__seed=9, name=None)
    assert got == Outer(3, (4, 5), Inner(7, 0, 'x', 1.), Other(9, True)) and before == Outer()


@pytest.mark.parametrize('value, kind, want', [('3', int, 3), (3, float, 3.), ('1e-4', float, 1e-4), ('False', bool, False), ('', float | None, None),
                                               (None, int | None, None), ('2', int | None, 2), (7, tuple, (7,)), ([1, '2'], tuple, (1, 2)), ('a', str, 'a')])
def test_values_become_what_their_field_holds(value, kind, want): assert as_type('k', value, kind) == want

@pytest.mark.parametrize('value, kind', [(2.5, int), (True, int), ('many', int), ('maybe', bool), (1, str), ('a,b', tuple), ('', tuple), (None, int)])
def test_values_of_another_kind_are_refused(value, kind):
    with pytest.raises(UserError, match='k = '): as_type('k', value, kind)


def test_differing_looks_into_nested_settings():
    a, b = dict(walk=dict(t0=400, n=4), lr=1.), dict(walk=dict(t0=300, n=4), lr=1., new=0)
    assert flatten(a) == {'walk.t0': 400, 'walk.n': 4, 'lr': 1.}
    assert differing(a, b) == [('new', None, 0), ('walk.t0', 400, 300)] and differing(a, a) == []
