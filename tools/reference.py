"""Write what the reference says about the API's operations, or check it with `--check`.

`docs/reference/openapi.json` is a copy of the document that the server sends. `docs/reference/api.md` has a table of
operations and one of scopes.
"""

import json
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import msgspec

from opsentry.bootstrap import OPERATIONS
from opsentry.http.openapi import build_document
from opsentry.http.operation import Operation
from opsentry.identity.scopes import MEANINGS

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
BASE = "/api/v1"
AUDIENCES = {"tenant": "any token", "operator": "operator token", "anyone": "\N{EN DASH}"}


def parameters(operation: Operation) -> Iterator[str]:
    """Yield the query parameters of `operation`, each with its default in parentheses."""
    for field in msgspec.structs.fields(operation.query) if operation.query else ():
        name = f"`{field.encode_name}`"
        is_shown = field.default not in (None, False, msgspec.NODEFAULT)
        yield f"{name} ({field.default:,})" if is_shown and isinstance(field.default, int) else name


def operations() -> Iterator[str]:
    """Yield the lines of the table of operations."""
    yield "| operation | scope | what it does | query parameters |"
    yield "|---|---|---|---|"
    for each in OPERATIONS:
        path = each.path.removeprefix(BASE)
        outside = "" if path != each.path else f" (no `{BASE}`)"
        scopes = ", ".join(f"`{scope}`" for scope in each.scopes) or AUDIENCES[each.audience]
        status = "" if each.status == HTTPStatus.OK else f" ({each.status})"
        yield f"| `{each.method} {path}`{outside} | {scopes} | {each.summary}{status} | {', '.join(parameters(each))} |"


def scopes() -> Iterator[str]:
    """Yield the lines of the table of scopes."""
    yield "| scope | allows |"
    yield "|---|---|"
    for scope, meaning in MEANINGS.items():
        yield f"| `{scope}` | {meaning} |"


def files() -> dict[Path, str]:
    """Return the text that each generated file must have."""
    page = REFERENCE / "api.md"
    text = page.read_text()
    for name, lines in (("operations", operations()), ("scopes", scopes())):
        table = "\n".join(line.replace("|  |", "| |") for line in lines)
        before, begin, rest = text.partition(f"<!-- {name}:begin -->")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    document = json.dumps(build_document(OPERATIONS), indent=1, ensure_ascii=False)
    return {page: text, REFERENCE / "openapi.json": f"{document}\n"}


def main() -> int:
    """Write the files; with `--check`, report those that differ and return 1."""
    differing = [(path, text) for path, text in files().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path, _ in differing:
            print(f"{path.relative_to(Path.cwd())} is out of date: run `make reference`", file=sys.stderr)
        return 1 if differing else 0
    for path, text in differing:
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
