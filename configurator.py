# Overrides for the plain globals at the top of a script, which exec's this file after them:
#
#     python dkdm.py config/dkdm_cifar10.py --rho=0.2 --student_config.model_channels=64
#
# Config files are Python files of assignments, applied in the order given; then every --key=value,
# typed like the default that it replaces (an int where a float is wanted is fine).
# --key.name=value changes one entry of a dict, --key="{...}" several; a dict NAME_config is
# replaced as a whole by the latter, and may have any entries. Keys that do not exist, wrong types
# and words that are not in the script's _ranges end in one line and exit code 2. --help lists the
# keys.
import ast
import builtins
import difflib
import math
import os
import re
import signal
import sys
import time


def _refuse(message):
    """Prints one line and ends with exit code 2, on any number of ranks.

    torchrun ends all ranks as soon as one has ended. Rank 0 is the first, so the others are ended
    here before they repeat its message; if it does not refuse, the rank that does prints its own.
    """
    alone = os.environ.get('WORLD_SIZE', '1') == '1'
    if not alone and os.environ.get('RANK', '0') != '0':
        _wait_to_be_ended(3)
    # torch collects what its own excepthook prints in sys.stderr, and os._exit would lose it
    script = os.path.basename(sys.argv[0])
    bars = getattr(sys.modules.get('tqdm'), 'tqdm', None)
    begin = '\n' if getattr(bars, '_instances', None) else ''     # below an open progress bar
    print(f"{begin}{script}: {' '.join(message.split())}", file=sys.__stderr__, flush=True)
    if alone:
        sys.exit(2)
    sys.stdout.flush()
    os._exit(2)                                # a normal exit could hang while other ranks wait


def _wait_to_be_ended(seconds):
    """Gives torchrun the time to end this process because of another one that has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def _one_line(kind, error, traceback):
    """sys.excepthook: a UserError is one line and exit code 2; all else keeps its traceback."""
    if any(c.__name__ == 'UserError' for c in kind.__mro__):
        _refuse(str(error))
    if os.environ.get('WORLD_SIZE', '1') != '1':
        _wait_to_be_ended(1)                   # the error may be that another rank is gone
    sys.__excepthook__(kind, error, traceback)


def _assign(key, value, where):
    """Sets a global of the script, or exits with a message that says what would be right."""
    if key not in _defaults:
        close = difflib.get_close_matches(key, _defaults, n=1)
        hint = f'did you mean {close[0]!r}?' if close else '--help lists them'
        _refuse(f'{where}: no key {key!r}, {hint}')
    default = _defaults[key]
    if type(default) is dict and type(value) is dict and not key.endswith('_config'):
        value = _entries(key, globals()[key], value, where)
    if type(default) is float and type(value) is int:
        value = float(value)
    allowed = globals().get('_ranges', {}).get(key)
    if type(value) is not type(default):
        _refuse(f'{where}: {key} is {type(default).__name__}, e.g. {default!r}, not {value!r}')
    if allowed and value not in allowed:
        _refuse(f"{where}: {key} is one of {', '.join(map(repr, allowed))}, not {value!r}")
    if type(value) is float and not math.isfinite(value):
        _refuse(f'{where}: {key} is not a finite number')
    if type(value) is str:                     # ~ in paths, also after the comma or colon of a list
        home = os.path.expanduser('~')
        value = re.sub('(^|[,:])~(?=/|$)', lambda found: found[1] + home, value)
    globals()[key] = value


def _entries(key, now, changes, where):
    """The dict `now` with changes. Only NAME_config may have entries that the default lacks."""
    for entry, value in changes.items():
        if entry not in now:
            _refuse(f"{where}: {key} has no entry {entry!r}; it has {', '.join(now)}")
        wanted = (int, float) if type(now[entry]) is float else type(now[entry])
        if not isinstance(value, wanted):
            _refuse(f'{where}: {key}.{entry} is e.g. {now[entry]!r}, not {value!r}')
    return now | changes


def _literal(text):
    """The value of a Python literal; the text itself if it is not one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _help():
    """Prints the docstring and the settings of the script, with their comments."""
    print((__doc__ or '').strip() + '\n')
    with open(sys.argv[0], encoding='utf-8') as f:
        text = f.read()
    docstring = ast.parse(text).body[0]
    settings = '\n'.join(text.splitlines()[docstring.end_lineno:]).split('configurator.py')[0]
    shown = False
    for line in settings.splitlines():
        shown = shown and line.startswith(' ')  # a setting of several lines goes on
        assignment, _, comment = line.partition('#')
        key, _, value = (part.strip() for part in assignment.partition('='))
        if key in _defaults and line.startswith(key):
            print(f'--{key + "=" + value:<50} {comment.strip()}')
            shown = True
        elif line.startswith('# '):
            print(f'\n{line}')
        elif line.startswith(' ') and line.strip().startswith('# '):    # a continued comment
            print(' ' * 53 + comment.strip())
        elif shown:
            print(' ' * 6 + line.strip())


_types = (bool, int, float, str, tuple, dict)
_defaults = {k: v for k, v in globals().items() if not k.startswith('_') and type(v) in _types}
sys.excepthook = _one_line
if '--help' in sys.argv[1:] or '-h' in sys.argv[1:]:
    _help()
    sys.exit(0)
for _arg in sys.argv[1:]:                      # the files first ...
    if _arg.startswith('-') and '=' not in _arg or not _arg.startswith('--') and '=' in _arg:
        _refuse(f'{_arg}: overrides look like --key=value')
    if not _arg.startswith('--'):
        if not os.path.isfile(_arg):
            _refuse(f'no config file {_arg!r}; overrides look like --key=value')
        _values = {}
        with open(_arg, encoding='utf-8') as _f:
            # builtins, because `compile` is also a setting
            exec(builtins.compile(_f.read(), _arg, 'exec'), _values)
        for _key, _value in _values.items():
            if not _key.startswith('_'):
                _assign(_key, _value, _arg)
for _arg in sys.argv[1:]:                      # ... then the overrides
    if _arg.startswith('--'):
        _key, _, _value = _arg[2:].partition('=')
        _key, _dot, _entry = _key.partition('.')
        if _dot and type(_defaults.get(_key)) is dict:
            _before = globals()[_key] if _key.endswith('_config') else {}
            _assign(_key, _before | {_entry: _literal(_value)}, _arg)
        elif type(_defaults.get(_key)) is str:
            _assign(_key + _dot + _entry, _value, _arg)
        else:
            _assign(_key + _dot + _entry, _literal(_value), _arg)
