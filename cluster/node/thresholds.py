"""When a number of a run is called a finding, and why there: every threshold of the rules, in one place.

They are set so that a run which is only short, or only beginning, raises none; steps and updates are counted as in
the metrics.
"""
from __future__ import annotations

# --- how much must be known before anything is judged --------------------------------------------------------

# A fresh model's first outputs are white, alike or grey whatever becomes of it: a reconstructor gains 8 dB in its
# first update by turning white. 30 updates took the demo past every baseline.
SETTLED_UPDATES = 50
# An evaluation can be unlucky; two in a row that say the same cannot.
EVALUATIONS = 2
# Points that a mean is taken of: the loss of one step says little.
RECENT = 20

# --- loss and gradients --------------------------------------------------------------------------------------

# One step that is not finite is skipped and forgotten; three logged ones in a row are a state of the weights.
NONFINITE_STREAK = 3
# An isolated one is worth a warning for so many logged steps, then it is history.
NONFINITE_RECENT = 200
# Healthy runs skip an update now and then (far less than 1 in 100); below nine of ten the schedule, counted in
# applied updates, misses its end. At one in two the run costs twice what was planned. The public mouse run that made
# these rules applied 9 % and was noticed after hours.
APPLIED_WARNING = 0.9
APPLIED_ERROR = 0.5
SKIP_WINDOW = 200  # updates looked back on, so that a run that has recovered is well again
SKIP_FEWEST = 20  # updates: three skipped ones of five are a warm-up that is too short, not yet a run
# A contrastive loss over a batch of B that knows nothing is ln B. The public face-voice run stood at 2.755..2.772
# (ln 16 = 2.773) for 46 epochs: its last, smaller batches (7 of 16, 15 of 16) pull the mean of an epoch below ln B.
CHANCE_BAND = 0.02
# No single point may be further away than this: the losses of diffusion are noisy and pass by such values, that of a
# collapsed contrastive model is nearly the same for every batch. Where the batch is not known (any power of two may be
# meant) this is asked from the first point on, else of the newer half.
CHANCE_NOISE = 0.08
CHANCE_UPDATES = 100  # the tiny towers of the demo are clear of chance after 40
CHANCE_POINTS = 20  # of a log that counts no updates: its lines
CHANCE_IN_WARMUP_UPDATES = 300  # while the rate still rises, this much patience
# Two steps of any real batch have never the same loss to the last bit.
SAME_LOSS = 20
# grad_norm is exactly 0 when no gradient reaches what is trained. Update 0 of a LoRA is near it, five are not.
ZERO_GRADIENTS = 5

# Of the weights that had a gradient, the share that changed in ten updates at half of the highest rate or more. fp32:
# all of them (what stays has a gradient below 1e-12). bf16 has 7 bits behind the first: a step of 1e-5 moves only what
# is smaller than 0.003 to 0.005, a fifth of a layer whose weights are 0.02 in the mean; at 1e-4 nearly all move.
WEIGHTS_MOVED = 0.5

# --- learning rate -------------------------------------------------------------------------------------------

# With a warm-up of two updates or more the rate must have moved by then.
LR_UPDATES = 20
# A cosine over at least LR_UPDATES updates ends below 1 % of its peak; at 5 % a part of it was not reached.
LR_END_SHARE = 0.05

# What is proposed where a rate was too high: a fifth of it, and at most what Adam and its kin are begun with, so that
# one that is off by a factor of a thousand is not approached in steps of five. The warm-up is a tenth of the run at
# most.
GENTLER_RATE = 5.0
SANE_RATE = 1e-3
LONGER_WARMUP = 500.0
WARMUP_PART = 10

# --- outputs, by validation ----------------------------------------------------------------------------------

# A picture that is white but for noise differs from the white picture's score by hundredths of a dB.
WHITE_DB = 0.3
COPY_DB = 0.3
# Spread between generated views over that between true ones. 0.9 and more in every healthy run at demo size, 0.45 and
# more in those of 200 steps; 0.26 to 0.30 in a tiny model that was trained on one picture for all views, because the
# noise of the last sampling steps stays in a small model's views.
DIVERSITY = 0.35
COPIED_DIVERSITY = 0.5  # with the score of the copied picture as well
# Nearer to the picture put in than to the truth by so much: 3.7 dB where the targets were the input; 1.5 where they
# were all another view, and 2 in a healthy run of 160 steps, which has not yet learned where the views differ.
COPIED_DB = 3.0
# Views that were put in come back up to 2 dB better than others in a healthy run; 6.5 dB in one that was trained on
# nothing else.
INPUT_GAP_DB = 5.0
INPUT_GAP_UPDATES = 200
# Another object's picture put in costs a model that looks at it several dB (2.6 at a quarter of the demo; 0.7 in the
# first 200 updates of a tiny one, 0.3 in one whose training inputs belonged to other objects).
OTHER_DB = 0.5
OTHER_UPDATES = 500
# A run that went to its end is judged by what it has learned then.
GAP_UPDATES = 200
# Unrelated embeddings of the demo have a mean cosine below 0.3; at this they are one point.
SAME_COSINE = 0.95
# Below what costs no learning: only where validation no longer rises, or at the end. A short run is below it and well.
BASELINE_UPDATES = 500
BASELINE_EVALUATIONS = 4
BASELINE_RISE_DB = 0.1
# A share (accuracy, AUC) that is no further from chance than this part of the way to 1.
SHARE_ABOVE_CHANCE = 0.05
# Validation fell from its best, over so many evaluations, while training went on improving. The demo on 24 mice falls
# 0.5 dB and is no worse for it.
FALLEN_EVALUATIONS = 3
FALLEN_DB = 1.0
FALLEN_LOSS = 1.1  # times the best
TRAIN_IMPROVED = 0.95  # times the loss at that time
# Training pictures that look so much better than validation's are known by heart.
GAP_DB = 8.0
GAP_LOSS = 2.0  # times the training loss

# --- what progress rules read ---------------------------------------------------------------------------------

# A log may name its loss once in many steps. Steps without one are too many when they are so many, and so many
# times the longest stretch without one before.
UNREAD_STEPS = 5
UNREAD_TIMES = 3
# The last step that a program prints may be short of its total by how often it prints, or by counting from 0.
EARLY_SHARE = 0.9
EARLY_LINES = 2

# --- pace ----------------------------------------------------------------------------------------------------

# Other jobs of a shared node come and go and cost up to half of the speed for a while: twice as slow, and that for a
# minute, is something else (a loader that starves, a disk, a throttled GPU).
SLOWER = 2.0
SLOWER_S = 60.0
SLOWER_STEPS = 30
SETTLING_STEPS = 10  # compilation, caches
# The share of the time in which there was no data, smoothed over some ten steps. At more than half a second set of
# loader processes would save more than it costs; for a shorter time it may be a disk that was busy, or a cold cache.
STARVED = 0.5
STARVED_STEPS = 20
STARVED_WORKERS = 4  # that are proposed at least
# A look sees a second of five minutes. A job that is busy for half of the time, in bursts, is idle in six of six looks
# once in sixty times; one that computes at all is above 10 % whenever it is seen.
IDLE_LOOKS = 6
IDLE_PERCENT = 10
# A hang: three median steps and 20 s without a line, but never less than twice the longest pause of the newest steps,
# and after a step at which it evaluates twice the longest evaluation, because that may just be going on. Looking at its
# processes takes up to ten seconds more.
STALL_STEPS = 3.0
STALL_PAUSES = 2.0
STALL_S = 20.0
# The first evaluation of a job whose config says that this is the step for it: nobody knows yet how long it takes.
STALL_FIRST_EVALUATION_S = 1800.0
# Until the first steps: libraries, weights, lists and caches of a large run take minutes; a rendezvous in which one
# rank is missing takes for ever.
STALL_FIRST_STEP_S = 1800.0
STALL_LINES = 500  # of the newest steps that pauses are measured in
STALL_JUMP = 2  # times the usual distance of two lines: further apart, what lies between them was not read
STALL_FEWEST = 3  # lines before there is a median
