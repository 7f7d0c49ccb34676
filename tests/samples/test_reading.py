import torch

from sae.samples import read_activations
from sae.samples.reading import encode_in_pieces
from sae.samples.survey import Choice


def choice_of(features, contexts_FK, near_FM):
    return Choice(torch.tensor(features), None, torch.tensor(contexts_FK), None, torch.tensor(near_FM))


def test_second_look_reads_every_token():
    rng = torch.Generator().manual_seed(5)
    f_NTF = torch.rand(6, 3, 4, generator=rng)
    f_NTF[5, 0, 2] = 1e6
    choice = choice_of([2, 3], [[5, 2, -1], [2, 0, 5]], [[2, 0], [-1, 5]])
    kept = f_NTF[[0, 2, 5]]
    numbers = torch.tensor([0, 2, 5])
    pieces = zip(numbers.split(2), kept.split(2), strict=True)
    got, peak_FM = read_activations(pieces, choice, tokens=5)
    assert got.shape == (2, 3, 5) and got.dtype == torch.float16
    assert not got[:, :, :2].any() and not got[0, 2].any()
    torch.testing.assert_close(got[1, :, 2:], f_NTF[[2, 0, 5], :, 3].half(), rtol=0, atol=0)
    torch.testing.assert_close(peak_FM[0], f_NTF[[2, 0], :, 2].amax(1), rtol=0, atol=0)
    assert peak_FM[1].tolist() == [0.0, f_NTF[5, :, 3].max().item()]
    assert got[0, 0, 2:].tolist() == [65504.0, *f_NTF[5, 1:, 2].half().tolist()]


def test_other_pieces_in_another_order_read_the_same():
    # What two processes read of the same contexts adds up to what one reads.
    f_NTF = torch.rand(9, 2, 3, generator=torch.Generator().manual_seed(6))
    choice = choice_of([0, 2], [[8, 3, 1], [3, -1, 7]], [[7], [1]])
    parts = [(torch.tensor(numbers), f_NTF[numbers]) for numbers in ([1, 3], [7], [8])]
    whole = read_activations(parts, choice, tokens=2)
    first, second = (read_activations(some, choice, tokens=2) for some in ([parts[2], parts[0]], [parts[1]]))
    assert all(torch.equal(w, a + b) for w, a, b in zip(whole, first, second, strict=True))


def test_encoding_comes_in_pieces(monkeypatch):
    class Doubling:
        b_enc = torch.zeros(4)

        def features(self, x_ND):
            return x_ND.float() * 2

    monkeypatch.setattr("sae.samples.reading.PIECE", 2 * 3 * 4)  # two contexts, three tokens, four features
    acts_BTD = torch.arange(5 * 3 * 4.0).view(5, 3, 4)
    numbers, pieces = zip(*encode_in_pieces(Doubling(), torch.arange(10, 15), acts_BTD), strict=True)
    assert [n.tolist() for n in numbers] == [[10, 11], [12, 13], [14]]
    assert torch.equal(torch.cat(pieces), acts_BTD * 2)
