from hypothesis import given
from hypothesis import strategies as st

from opsentry.domain.service import SLUG
from opsentry.importing.statuspage import Component
from opsentry.importing.translation import assign_slugs


def of(*names):
    return list(assign_slugs(Component(id=f"c{number}", name=name) for number, name in enumerate(names)).values())


def test_names_become_slugs():
    assert of("API Requests", "  Visit www.example.com! ", "Ünïcode (EU)") == [
        "api-requests",
        "visit-www-example-com",
        "n-code-eu",
    ]


def test_a_name_without_letters_uses_the_id():
    assert of("日本") == ["c0"]


def test_ids_distinguish_components_of_equal_name():
    assert of("API", "Api", "api") == ["api", "api-c1", "api-c2"]


def test_a_slug_of_another_name_is_not_assigned_twice():
    assert of("API C1", "API", "api-c2", "api") == ["api-c1", "api", "api-c2", "api-c3"]
    assert of("api", "api-c2", "API") == ["api", "api-c2", "api-c2-2"]


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), unique_by=lambda pair: pair[1]))
def test_every_component_gets_a_unique_valid_slug(pairs):
    found = assign_slugs(Component(id=id_, name=name) for name, id_ in pairs)
    assert len(found) == len(pairs)
    assert len(set(found.values())) == len(pairs)
    assert all(SLUG.fullmatch(slug) for slug in found.values())
