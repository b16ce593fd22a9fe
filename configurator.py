# Overrides for the plain globals at the top of a script: exec'd by each of them after its config block.
#
#     python dkdm.py config/dkdm_cifar10.py --rho=0.2 --channel_mult="(1, 2, 2)"
#
# Config files are Python files of assignments, applied in the order given; then every --key=value, typed like the
# default it replaces (an int where a float is wanted is fine). Anything wrong is one line on stderr and exit code 2,
# before any work starts. --help lists the keys.
#
# Numbers are finite; they are negative only where the default is, and an int is 0 only where the default is. What is
# special stands in the script's _ranges: of a key the lowest and the highest number, or the words that it may be.
import ast
import difflib
import os
import signal
import sys
import warnings

if not sys.warnoptions:
    warnings.simplefilter('ignore')                                # the libraries' would stand before the one line

for _s in (signal.SIGINT, signal.SIGTERM):                                     # no traceback, until the loop saves
    signal.signal(_s, signal.SIG_DFL if 'RANK' in os.environ else lambda s, _: os._exit(128 + s))


def _die(message):
    if os.environ.get('RANK', '0') == '0':                                     # all ranks read the same
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _flat(value):
    """What a value holds: the entries of tuples, the values of dicts."""
    if isinstance(value, (tuple, list, dict)):
        return [v for part in (value.values() if isinstance(value, dict) else value) for v in _flat(part)]
    return [value]


def _wanted(key, value):
    """What would be right in place of a value; '' where it is right."""
    default, allowed = _defaults[key], globals().get('_ranges', {}).get(key)
    example = f'{type(default).__name__}, e.g. {default!r}'
    if type(value) is not type(default) or isinstance(value, dict) and not all(isinstance(k, str) for k in value):
        return example
    if isinstance(value, tuple) and (allowed and not value or any(type(v) not in (int, float) for v in value)):
        return 'a tuple of numbers, e.g. ' + repr(default)
    like = -1. if isinstance(default, dict) else default[0] if isinstance(default, tuple) else default
    for v in _flat(value):
        if isinstance(v, str):
            if allowed and v not in allowed:
                return ', '.join(map(repr, allowed))
            if any(c < ' ' or '\ud800' <= c <= '\udfff' for c in v):
                return 'one line of UTF-8'
        elif type(v) in (int, float):
            low, high = allowed or ((int(type(like) is int and like > 0), 2 ** 32 - 1 if type(like) is int else 1e30)
                                    if like >= 0 else (-1e30, 1e30))
            if not low <= v <= high:                                           # nor is nan
                return ('above 0' if low == 1e-30 else f'from {low}') + f' to {high}'
    return ''


def _check(key, value, where):
    if key not in _defaults:
        close = difflib.get_close_matches(key, _defaults, n=1)
        _die(f'{where}: no key {key!r}' + (f', did you mean {close[0]!r}?' if close else '; --help lists them'))
    if type(_defaults[key]) is float and type(value) is int and abs(value) < 1e30:
        value = float(value)
    if _wanted(key, value):
        _die(f'{where}: {key} is {_wanted(key, value)}, not {value!r}')
    globals()[key] = value


_defaults = {k: v for k, v in globals().items()
             if not k.startswith('_') and type(v) in (bool, int, float, str, tuple, dict)}

if '--help' in sys.argv[1:] or '-h' in sys.argv[1:]:
    print((__doc__ or '').strip() + '\n')
    with open(sys.argv[0], encoding='utf-8') as _f:
        for _line in _f.read().split('configurator.py')[0].splitlines():
            _assignment, _, _comment = _line.partition('#')
            _key, _, _value = (p.strip() for p in _assignment.partition('='))
            if _key in _defaults and _line.startswith(_key):
                print(f'--{_key + "=" + _value:<50} {_comment.strip()}')
            elif _line.startswith('# '):
                print(f'\n{_line}')
            elif _line.startswith(' ') and _line.strip().startswith('# '):     # the comment goes on
                print(' ' * 53 + _comment.strip())
    sys.exit(0)

for _arg in sorted(sys.argv[1:], key=lambda a: a.startswith('--')):            # files first, then --key=value
    if not _arg.startswith('--'):
        if not os.path.isfile(_arg):
            _die(f'no config file {_arg!r}; overrides look like --key=value')
        _values = {}
        try:
            with open(_arg, encoding='utf-8') as _f:
                exec(_f.read(), _values)
        except (Exception, SystemExit, KeyboardInterrupt) as _e:
            _die(f'{_arg} does not run: {type(_e).__name__}: {_e}')
        for _key, _value in _values.items():
            if not _key.startswith('_'):
                _check(_key, _value, _arg)
    else:
        _key, _eq, _value = _arg[2:].partition('=')
        if not _eq:
            _die(f'{_arg}: overrides look like --key=value')
        if type(_defaults.get(_key)) is not str:
            try:
                _value = ast.literal_eval(_value)
            except Exception:
                pass                                                           # _check says what is expected
        _check(_key, _value, _arg)
