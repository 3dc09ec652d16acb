"""The networks of two pixels about which something is proved, for the explorer `boxes`.

    python tools/toy_boxes.py

trains them and writes data/toy-boxes.safetensors: weights, and how far proofs get. One core, about five minutes.
"""
from safetensors.torch import save_file

from rs_toolkit.common import data_folder
from rs_toolkit.explore.toy import PROBLEMS
from rs_toolkit.explore.toy_boxes import ALPHAS, BETWEEN, TRAININGS, measured, name_of, train_boxed

def networks(problem):
    "Name -> network, the teacher before its students."
    teacher = train_boxed(problem, 'Adversarial')
    for training in TRAININGS:
        for alpha in ALPHAS if training in BETWEEN else [None]:
            model = teacher if training == 'Adversarial' else train_boxed(problem, training, alpha, teacher)
            yield name_of(problem, training, alpha), model

if __name__ == '__main__':
    kept = {}
    for problem in PROBLEMS:
        for name, model in networks(problem):
            print(name, flush=True)
            kept |= {f'{name}/{key}': tensor for key, tensor in measured(model, problem).items()}
    save_file(kept, data_folder()/'toy-boxes.safetensors')
