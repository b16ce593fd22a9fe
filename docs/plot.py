"""
Draws the plots of docs/results.md from what its commands leave in out/. Needs matplotlib, which nothing else here needs.

    python docs/plot.py methods            # distance against seconds of training, a line for each method
    python docs/plot.py few_steps          # distance against evaluations, for three samplers
    python docs/plot.py diffdfkd_mnist     # the losses of synthesize.py over the denoising steps

Each writes assets/NAME.png.
"""
import csv
import json
import sys

import matplotlib.pyplot as plt


def read_log(run):
    """The rows of a run's log.csv, as dicts of strings."""
    with open(f'out/{run}/log.csv', newline='') as f:
        return list(csv.DictReader(f))


def distances(run):
    """The rows of a run's log.csv in which the distance was measured (--eval_every)."""
    return [row for row in read_log(run) if row['frechet']]


def methods():
    for run in (
        'mnist-dynamic-1', 'mnist-shuffled-1', 'mnist-synthetic-1', 'mnist-data-1',
        'mnist-iterative-0', 'long', 'stride1'
    ):
        rows = distances(run)
        seconds = [float(row['seconds']) for row in rows]
        plt.loglog(seconds, [float(row['frechet']) for row in rows], '.-', label=run)
    plt.xlabel('seconds')
    plt.ylabel('distance')
    plt.legend()


def few_steps():
    with open('out/samplers/metrics.jsonl') as f:
        rows = [json.loads(line) for line in f]
    rows.sort(key=lambda row: row['steps'])
    for model, style in ('student', 'o-'), ('mnist_classes', 's--'):
        for sampler in 'ddim', 'dpm++', 'ddpm':
            own = [row for row in rows if model in row['model'] and row['sampler'] == sampler]
            steps = [row['steps'] for row in own]
            plt.plot(steps, [row['Frechet'] for row in own], style, label=f'{model}, {sampler}')
    plt.xscale('log', base=2)
    plt.xticks([2, 4, 8, 16, 50], [2, 4, 8, 16, 50])
    plt.xlabel('evaluations')
    plt.ylabel('distance')
    plt.legend()


def diffdfkd_mnist():
    _, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout='constrained')
    for run, style in ('ours', '-'), ('paper', '--'), ('dmkd', 'o'):
        rows = read_log(f'rows/{run}-0')
        for ax, key in zip(axes, ('bn', 'cls')):
            at = {}                                                    # t -> the values of all batches
            for row in rows:
                at.setdefault(int(row['t']), []).append(float(row[key]))
            t = list(at)
            mean = [sum(values) / len(values) for values in at.values()]
            ax.semilogy(t, mean, style, markersize=4, label=run)
            if style != 'o':
                low = [min(values) for values in at.values()]
                ax.fill_between(t, low, [max(values) for values in at.values()], alpha=0.2)
            ax.set(title=key, xlabel='t', xlim=(1000, -20))
    axes[0].legend()
    axes[2].imshow(plt.imread('out/rows/ours-0/preview.png'), cmap='gray')
    axes[2].axis('off')


PLOTS = {f.__name__: f for f in (methods, few_steps, diffdfkd_mnist)}
if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in PLOTS:
        sys.exit(f"python docs/plot.py NAME, one of {', '.join(PLOTS)}")
    PLOTS[sys.argv[1]]()
    plt.savefig(f'assets/{sys.argv[1]}.png', dpi=90)
