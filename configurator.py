# Overrides for the plain globals at the top of a script: exec'd by each of them after its config block.
#
#     python dkdm.py config/dkdm_cifar10.py --rho=0.2 --channel_mult="(1, 2, 2)"
#
# Config files are Python files of assignments, applied in the order given; then every --key=value, typed like the
# default it replaces (an int where a float is wanted is fine). Anything wrong is one line on stderr and exit code 2,
# before any work starts. --help lists the keys.
import ast
import difflib
import os
import sys


def _die(message):
    print(f'{os.path.basename(sys.argv[0])}: {message}', file=sys.stderr)
    sys.exit(2)


def _check(key, value, where):
    if key not in _defaults:
        close = difflib.get_close_matches(key, _defaults, n=1)
        _die(f'{where}: no key {key!r}' + (f', did you mean {close[0]!r}?' if close else '; --help lists them'))
    want = type(_defaults[key])
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want:
        _die(f'{where}: {key} is {want.__name__}, e.g. {_defaults[key]!r}, not {value!r}')
    globals()[key] = value


_defaults = {k: v for k, v in globals().items() if not k.startswith('_') and type(v) in (bool, int, float, str, tuple, dict)}

if '--help' in sys.argv[1:] or '-h' in sys.argv[1:]:
    print((__doc__ or '').strip() + '\n')
    with open(sys.argv[0], encoding='utf-8') as _f:
        for _line in _f.read().split('configurator.py')[0].splitlines():
            _assignment, _, _comment = _line.partition('#')
            _key, _, _value = (p.strip() for p in _assignment.partition('='))
            if _key in _defaults:
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
        except Exception as _e:
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
            except (ValueError, SyntaxError):
                pass                                                           # _check says what is expected
        _check(_key, _value, _arg)
