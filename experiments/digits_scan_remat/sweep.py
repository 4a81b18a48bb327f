"""What do scan and rematerialisation cost a small model of 12 blocks, in steps and in compilation?

Hypothesis   scan and loop train equally fast and scan compiles several times faster; remat=full costs a third more
             (one more forward pass), remat=dots less
Decides      train/images_per_sec over the last 18 steps; the column secs of results.csv is the whole run, so that it
             holds the compilation
Budget       6 points of 4 epochs, one by one and with nothing else on the machine; not for --vmap
"""

BASE = "experiments/digits_scan_remat/base.py"


def sweep():
    for scan in (True, False):
        for remat in ("none", "dots", "full"):
            yield {"model.scan": scan, "model.remat": remat}


def metrics():
    return ["train/images_per_sec", "test/top1"]
