"""Comparisons that know their uncertainty: exact on tiny logs, right in 95 % of simulated worlds, careful with many."""
from itertools import product

import numpy as np
import pandas as pd
import pytest

from rs_toolkit.metrics import average_certified_radius
from rs_toolkit.paired import band, differences, holm, how_many, images_needed, in_words, marked, power, verdicts

def log_of(radii, weights='w'):
    "A log whose image i is right with radius radii[i]; it abstains where that is negative."
    radii = np.asarray(radii, float)
    right = radii >= 0
    images = len(radii)
    return pd.DataFrame(dict(
        idx=np.arange(images), label=1, predict=np.where(right, 1, -1), radius=np.maximum(radii, 0),
        correct=right.astype(int), n0=100, n=10_000, alpha=.001, sigma=.5, split='test', data='d', weights=weights))

# --- one network against one ---

@pytest.mark.parametrize('seed', range(4))
def test_a_tiny_log_against_all_ways_to_exchange_its_images(seed):
    "If neither network were better, each image might as well have given its two radii the other way round."
    first, second = np.random.default_rng(seed).choice([-1, .3, .6], (2, 9))
    table = differences({'a': log_of(first), 'b': log_of(second)}, [.2, .5], acr=False).set_index('measure')
    for radius in .2, .5:
        change = (second >= radius).astype(int) - (first >= radius)
        signs = np.array(list(product([-1, 1], repeat=9)))
        p = (np.abs(signs @ change) >= abs(change.sum())).mean()
        np.testing.assert_allclose(table.p[radius], p, err_msg=f'at radius {radius}')
        np.testing.assert_allclose(table.difference[radius], change.mean())

def simulated(rng, images, shift=0., easy=None):
    "Radii of a network on images that are easy for all networks, or hard."
    easy = rng.standard_normal(images) if easy is None else easy
    return np.maximum(easy + .4*rng.standard_normal(images) + shift, -1)

def within(share, expected, draws):
    "Whether a share of simulated worlds is what it should be, to four standard errors."
    return abs(share - expected) <= 4*np.sqrt(expected*(1 - expected)/draws)

def test_intervals_of_two_networks_hold_the_truth():
    "In 95 % of worlds: for ACR, and at a radius."
    rng = np.random.default_rng(0)
    many = rng.standard_normal(500_000)
    big = [simulated(rng, len(many), shift, many) for shift in (.1, .2)]
    truth = {'ACR': np.maximum(big[1], 0).mean() - np.maximum(big[0], 0).mean(),
             .5: (big[1] >= .5).mean() - (big[0] >= .5).mean()}
    held = dict.fromkeys(truth, 0)
    for _ in range(120):
        easy = rng.standard_normal(150)
        logs = {shift: log_of(simulated(rng, 150, shift, easy)) for shift in (.1, .2)}
        for row in differences(logs, [.5]).itertuples():
            held[row.measure] += row.low <= truth[row.measure] <= row.high
    for measure, times in held.items():
        assert within(times/120, .95, 120), f'{measure}: {times/120}'

def test_the_band_of_one_curve_holds_the_truth():
    rng = np.random.default_rng(0)
    truth = (simulated(rng, 500_000) >= .5).mean()
    bands = [band(log_of(simulated(rng, 150)), [.5]).iloc[0] for _ in range(150)]
    assert within(np.mean([b.low <= truth <= b.high for b in bands]), .95, 150)

# --- several seeds ---

def test_intervals_of_two_methods_hold_the_truth():
    "Whose networks differ by their seed as well; rather more than 95 % than less."
    rng = np.random.default_rng(1)
    held = dict.fromkeys([1, 4], 0)
    for _ in range(80):
        easy = rng.standard_normal(150)
        logs = {name: [log_of(simulated(rng, 150, .15*rng.standard_normal(), easy), f'{name}{seed}')
                       for seed in range(4)] for name in 'ab'}
        for seeds in held:
            some = {name: group[:seeds] for name, group in logs.items()}
            row = differences(some, [0.], acr=False).iloc[0]
            held[seeds] += row.low <= 0 <= row.high                                # the methods are the same
    assert held[4]/80 >= .95 - 4*np.sqrt(.05*.95/80)
    assert held[1]/80 < .9, 'one network each cannot speak for its method'

def test_claims_follow_the_seeds():
    rng = np.random.default_rng(0)
    a, b, c = ([log_of(simulated(rng, 40), f'{name}{seed}') for seed in range(3)] for name in 'abc')
    table = differences({'a': a, 'b': b, 'c': c[0]}, [0.])
    assert table.groupby('method').claim.unique().str[0].to_dict() == {'b': 'methods', 'c': 'networks'}
    assert table.seeds.tolist() == [3, 3, 1, 1]
    mean = np.mean([average_certified_radius(log) for log in b]) - np.mean([average_certified_radius(log) for log in a])
    np.testing.assert_allclose(table.difference[0], mean)

# --- many questions ---

def test_holm_in_its_order():
    "Each p-value times how many are not yet answered, and never below one that came before."
    p = np.array([.04, .001, .03, .02, .5])
    slow = {}
    highest = 0
    for rank, at in enumerate(np.argsort(p)):
        highest = max(highest, min(1, p[at]*(5 - rank)))
        slow[at] = highest
    np.testing.assert_allclose(holm(p), [slow[at] for at in range(5)])

def test_a_table_of_equals_seldom_finds_a_difference():
    "Five networks of one kind, at three radii: in at most one world of twenty does any differ from the first."
    rng = np.random.default_rng(0)
    worlds = 60
    wrong = 0
    for _ in range(worlds):
        easy = rng.standard_normal(100)
        logs = {name: log_of(simulated(rng, 100, easy=easy)) for name in range(5)}
        wrong += (differences(logs, [0, .5, 1], acr=False).verdict != '').any()
    assert wrong/worlds <= .05 + 4*np.sqrt(.05*.95/worlds)

def test_where_no_image_tells_there_is_no_question():
    far = [9.]*20
    logs = {'a': log_of([.1]*20 + far), 'b': log_of([.3]*20 + far), 'c': log_of([.1]*20 + far)}
    table = differences(logs, [.2, 5.], acr=False).set_index(['method', 'measure'])
    assert table.p['b', .2] == table.adjusted['b', .2] == 2**-19, 'the only question of the table'
    assert table.verdict.to_dict() == {('b', .2): 'better', ('b', 5.): '', ('c', .2): '', ('c', 5.): ''}
    assert verdicts(table.reset_index()).loc['b'].tolist() == ['+50.0 ▲', '+0.0']
    values = marked(table.reset_index())
    assert values.to_numpy().tolist() == [['50.0  ', '50.0  '], ['100.0 ▲', '50.0  '], ['50.0  ', '50.0  ']]

def test_marked_values_have_one_baseline():
    logs = {name: log_of([.1, .3, .5]) for name in 'abc'}
    table = differences(logs, [.2], pairs=[('a', 'c'), ('b', 'c')])
    with pytest.raises(ValueError, match='one baseline, but came a, b'): marked(table)
    with pytest.raises(ValueError, match='came no rows'): marked(table[:0])

# --- words and plans ---

def test_a_title_says_what_is_shown():
    even = [.1, .6]*20
    better = log_of(np.array(even) + .3)
    logs = {'a': log_of(even), 'b': better}
    assert in_words(differences(logs, [0, .3], acr=False)) == 'b against a: better at 0.3'
    assert in_words(differences({'b': better, 'a': logs['a']}, [.3])) == 'a against b: worse at 0.3 and in ACR'
    assert in_words(differences({'a': logs['a'], 'c': logs['a']}, [0])) == 'No difference between c and a is shown'
    three = differences(logs | {'c': logs['a']}, [0, .3], acr=False)
    assert in_words(three) == 'Against a, 1 of 4 differences are shown: 1 better'

def test_the_plan_is_what_simulated_logs_show():
    "As many images as the sentence asks for show the difference in four worlds of five."
    rng = np.random.default_rng(0)
    difference, discordance = .04, .12
    images = images_needed(difference, discordance)
    shares = [(discordance + difference)/2, (discordance - difference)/2, 1 - discordance]
    worlds = 100
    seen = 0
    for _ in range(worlds):
        won, lost, rest = rng.multinomial(images, shares)
        logs = {'a': log_of([-1.]*won + [.5]*lost + [.5]*rest), 'b': log_of([.5]*won + [-1.]*lost + [.5]*rest)}
        seen += differences(logs, [0.], acr=False).p[0] <= .05
    assert within(seen/worlds, .8, worlds), seen/worlds
    assert power(images, difference, discordance) >= .8

def test_the_sentence_holds_its_numbers():
    logs = {'a': log_of([-1.]*12 + [.5]*8 + [.5]*80), 'b': log_of([.5]*12 + [-1.]*8 + [.5]*80)}
    told = how_many(differences(logs, [0.]))
    assert told.startswith('b and a at radius 0 disagree on 20% of the images')
    assert f'{float(f"{images_needed(.01, .2):.2g}"):,.0f} images' in told

# --- refused ---

@pytest.mark.parametrize('change, says', [
    (lambda log: log[:-1], 'they share 29'),
    (lambda log: log.assign(label=2), 'another label'),
    (lambda log: log.assign(data='other'), 'other pixels'),
    (lambda log: log.assign(alpha=.01), 'alpha'),
    (lambda log: log.assign(n=np.nan), 'does not say its n'),
    (lambda log: pd.concat([log, log]), 'more than once'),
    (lambda log: log[:0], 'has 0 images'),
    (lambda log: [], 'has no log'),
    (lambda log: [log, log], 'two logs of the same network'),
])
def test_what_does_not_pair_is_refused(change, says):
    log = log_of(np.linspace(-.5, 1, 30))
    with pytest.raises(ValueError, match=says): differences({'a': log, 'b': change(log)}, [0.])
