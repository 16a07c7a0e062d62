-- Version 3: finished rollouts can be dropped, those that ended first going first.

CREATE INDEX rollout_by_end ON rollout (end_time)
WHERE status IN ('succeeded', 'failed', 'cancelled') AND deadline IS NULL;

-- The rollouts that were dropped last, so that whoever asks for one can be told.
CREATE TABLE dropped (
    ordinal INTEGER PRIMARY KEY, -- order of dropping; never given twice
    rollout INTEGER NOT NULL, -- its ordinal
    rollout_id TEXT NOT NULL UNIQUE,
    has_spans INTEGER NOT NULL -- 1 until its spans are deleted, which is done bit by bit
);

CREATE INDEX dropped_with_spans ON dropped (rollout) WHERE has_spans = 1;
