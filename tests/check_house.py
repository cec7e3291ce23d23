"""Does the package keep the rules of the house? Exit 1 with a list where not.

The rules, read off the syntax trees of `diffclip_da/`, nothing is imported:

- an import points to an earlier entry of ORDER or stays in its room, and no imports form a circle; an import inside a function counts as well
- no module uses a private name (`_name`) of another one
- a function or class is defined once, and its body stands once; a method stands in its class (no `@patch` from elsewhere)
- a library in RESERVED is imported only where the table says
- no line is longer than 120 characters
"""
import ast
import functools
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'diffclip_da'
# The rooms from the ground floor up. Modules that share an entry of the ground floor do not import each other.
ORDER = ('core', 'store settings', 'pictures', 'data', 'align styles', 'diffusion', 'models', 'adaptation', 'study', 'related', 'workshop')
ALIASES = {'adapt', 'train', 'unet', 'published'}  # names of the first edition, for its users
RESERVED = dict(hashlib=('core', 'store'), argparse=())
LONGEST = 120
ENTRY = 'main', 'Options'  # each command line has its own
SAME_BODY = 40  # nodes of the syntax tree: shorter bodies may look alike by chance

FLOOR = {room: k for k, entry in enumerate(ORDER) for room in entry.split()}


@functools.cache
def parsed(source: str) -> tuple:
    "(syntax tree, all its nodes)"
    tree = ast.parse(source)
    return tree, tuple(ast.walk(tree))


class Module:
    "One file of the package: its tree, what it imports from the package, and where"
    def __init__(self, path: Path, root: Path):
        self.path, self.where = path, path.relative_to(root).as_posix()
        parts = path.relative_to(root / PACKAGE).with_suffix('').parts
        self.is_init = parts[-1] == '__init__'
        self.name = '.'.join(parts[:-1] if self.is_init else parts)  # 'models.unet'; '' is the package itself
        self.package = '.'.join(parts[:-1])
        self.room = parts[0]
        self.source = path.read_text(encoding='utf-8')
        self.tree, self.nodes = parsed(self.source)
        self.exempt = self.is_init or self.name in ALIASES

    def absolute(self, node: ast.ImportFrom) -> str | None:
        "The module that `from ... import` names, dotted below the package; None for another package"
        if not node.level:
            first, _, rest = node.module.partition('.')
            return rest if first == PACKAGE else None
        up = self.package.split('.') if self.package else []
        if node.level > 1: up = up[:1 - node.level]
        return '.'.join(up + ([node.module] if node.module else []))


def is_private(name: str) -> bool: return name.startswith('_') and not name.endswith('__')


def imports(module: Module, names: set) -> list:
    "(line, imported module, name in it or None, name bound here) for every import from the package, at any depth"
    found = []
    for node in module.nodes:
        if isinstance(node, ast.Import):
            for a in node.names:
                first, _, rest = a.name.partition('.')
                if first == PACKAGE: found.append((node.lineno, rest, None, a.asname or PACKAGE))
        elif isinstance(node, ast.ImportFrom) and (base := module.absolute(node)) is not None:
            for a in node.names:
                inner = f'{base}.{a.name}'.strip('.')
                if inner in names: found.append((node.lineno, inner, None, a.asname or a.name))
                else: found.append((node.lineno, base, a.name, a.asname or a.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] in ('import_module', '__import__') and node.args:
            arg = node.args[0]
            if isinstance(arg, ast.Constant) and str(arg.value).startswith(f'{PACKAGE}.'):
                found.append((node.lineno, arg.value.partition('.')[2], None, ''))
    return found


def check_order(modules: dict) -> list:
    "Rooms that ORDER does not know, and imports that point up, sideways on the ground floor, or out of the front door"
    found = []
    for m in modules.values():
        if m.exempt: continue
        if m.room not in FLOOR:
            found.append(f'{m.where}: {m.room} is no room of ORDER (tests/check_house.py)'); continue
        for line, target, name, _ in imports(m, set(modules)):
            at, room = f'{m.where}:{line}', target.split('.')[0]
            if target == '':
                if name and not name.startswith('__'): found.append(f'{at}: imports {name} from the package itself, which is for its users')
            elif target in ALIASES: found.append(f'{at}: imports {target}, an old name for users of the first edition')
            elif room not in FLOOR: found.append(f'{at}: imports {target}, which is in no room')
            elif FLOOR[room] > FLOOR[m.room]: found.append(f'{at}: {m.name} imports {target}, which is above it')
            elif FLOOR[room] == FLOOR[m.room] and room != m.room: found.append(f'{at}: {m.name} imports {target}, which is beside it')
    return found


def check_circles(modules: dict) -> list:
    "Modules that import each other, each circle once"
    arrows = {n: sorted({t for _, t, _, _ in imports(m, set(modules)) if t in modules and t != n and t})
              for n, m in modules.items() if not m.exempt}
    found, done = set(), set()

    def visit(n, path):
        if n in path:
            circle = path[path.index(n):]
            k = circle.index(min(circle))
            found.add(' -> '.join([*circle[k:], *circle[:k], circle[k]]))
        elif n not in done:
            for t in arrows.get(n, ()): visit(t, [*path, n])
            done.add(n)

    for n in arrows: visit(n, [])
    return [f'circle: {c}' for c in sorted(found)]


def check_private(modules: dict) -> list:
    "Private names that are imported, reached through a module or a class, or reached on an object whose class stands elsewhere"
    own = {n: private_definitions(m.nodes) for n, m in modules.items()}
    found = []
    for m in modules.values():
        bound = {}
        for line, target, name, here in imports(m, set(modules)):
            if name and is_private(name): found.append(f'{m.where}:{line}: imports {name} of {target}')
            if here: bound[here] = target
        elsewhere = {a: n for n, names in own.items() if n != m.name for a in names}
        for node in m.nodes:
            if not isinstance(node, ast.Attribute) or not is_private(node.attr): continue
            root = node.value
            while isinstance(root, ast.Attribute): root = root.value
            through = isinstance(root, ast.Name) and bound.get(root.id)
            if through or (node.attr in elsewhere and node.attr not in own[m.name]):
                found.append(f'{m.where}:{node.lineno}: reaches {ast.unparse(node)}, private to {through or elsewhere[node.attr]}')
    return found


@functools.cache
def private_definitions(nodes: tuple) -> set:
    "Private functions, classes, methods, variables and attributes that a module makes"
    made = set()
    for n in nodes:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): made.add(n.name)
        elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store): made.add(n.attr)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): made.add(n.id)
    return {n for n in made if is_private(n)}


def check_twice(modules: dict) -> list:
    "Functions and classes of one name, and functions of one body"
    by_name, by_body = defaultdict(list), defaultdict(list)
    for m in modules.values():
        for node in m.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not decorated(node, 'patch', 'overload') \
                    and node.name not in (*ENTRY, '_'): by_name[node.name].append(f'{m.where}:{node.lineno}')
        for node in m.nodes:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
            body = node.body[ast.get_docstring(node) is not None:]
            if sum(1 for b in body for _ in ast.walk(b)) < SAME_BODY: continue
            shape = ast.unparse(ast.Module(body, [])), ast.unparse(node.args)
            by_body[shape].append(f'{m.where}:{node.lineno}')
    found = [f'{n} is defined {len(at)} times: {", ".join(at)}' for n, at in by_name.items() if len(at) > 1]
    return found + [f'one function body stands {len(at)} times: {", ".join(at)}' for at in by_body.values() if len(at) > 1]


def decorated(node, *names) -> bool:
    return any(ast.unparse(d).split('(')[0].split('.')[-1] in names for d in node.decorator_list)


def check_patches(modules: dict) -> list:
    "Methods that are added to a class from another module"
    found = []
    for m in modules.values():
        classes = {n.name for n in m.nodes if isinstance(n, ast.ClassDef)}
        bound = {here for _, _, name, here in imports(m, set(modules)) if name}
        for node in m.tree.body:
            if isinstance(node, ast.FunctionDef) and decorated(node, 'patch', 'patch_to', 'patch_property'):
                first = node.args.args[0].annotation if node.args.args else None
                cls = ast.unparse(first) if first is not None else '?'
                if cls not in classes: found.append(f'{m.where}:{node.lineno}: patches {node.name} into {cls}, whose module is another')
            for t in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in bound:
                    found.append(f'{m.where}:{node.lineno}: sets {ast.unparse(t)}, whose module is another')
    return found


def check_reserved(modules: dict) -> list:
    "Libraries with one place, imported in another"
    found = []
    for m in modules.values():
        for node in m.nodes:
            libs = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                   [node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else []
            for lib in {l.split('.')[0] for l in libs} & set(RESERVED):
                if m.name not in RESERVED[lib]:
                    found.append(f'{m.where}:{node.lineno}: imports {lib}, which is for {" and ".join(RESERVED[lib]) or "nobody"}')
    return found


def check_lines(modules: dict) -> list:
    "Lines that are too long; what nbdev writes above the first cell is not ours to break"
    found = []
    for m in modules.values():
        lines = m.source.split('\n')
        first = next((k for k, line in enumerate(lines) if line.startswith('# %% ../')), 0)
        found += [f'{m.where}:{k + 1}: {len(line)} characters, more than {LONGEST}' for k, line in enumerate(lines)
                  if k >= first and len(line) > LONGEST]
    return found


CHECKS = check_order, check_circles, check_private, check_twice, check_patches, check_reserved, check_lines


def read_package(root: Path = ROOT) -> dict:
    "name -> `Module` for every file of the package; nbdev's index is left out"
    files = [p for p in sorted((root / PACKAGE).rglob('*.py')) if p.name != '_modidx.py']
    return {m.name: m for m in (Module(p, root) for p in files)}


def broken_rules(root: Path = ROOT) -> list[str]:
    "One line for each place where the package breaks a rule"
    modules = read_package(root)
    return [line for check in CHECKS for line in check(modules)]


if __name__ == '__main__':
    found = broken_rules()
    print('\n'.join(found) if found else 'the house is in order')
    sys.exit(bool(found))
