-- Every statement whose text does not depend on a query, by name. In place of `(…)` the code writes as many question
-- marks as there are values, and in place of `VALUES …` as many rows.

-- name: rollout_by_id
SELECT * FROM stored_rollout WHERE rollout_id = ?;

-- name: rollouts_by_id
SELECT * FROM stored_rollout WHERE rollout_id IN (…);

-- name: rollouts_by_ordinal
SELECT * FROM stored_rollout WHERE ordinal IN (…);

-- name: rollout_by_attempt_id
SELECT stored_rollout.* FROM attempt JOIN stored_rollout ON stored_rollout.ordinal = attempt.rollout
WHERE attempt.attempt_id = ?;

-- name: head_of_queue
SELECT * FROM stored_rollout WHERE queue_position IS NOT NULL ORDER BY queue_position LIMIT ?;

-- name: queue_order
SELECT rollout_id FROM rollout WHERE queue_position IS NOT NULL ORDER BY queue_position;

-- name: queued_since
SELECT max(rollout.start_time, coalesce(max(attempt.end_time), rollout.start_time))
FROM rollout LEFT JOIN attempt ON attempt.rollout = rollout.ordinal
WHERE rollout.ordinal = (SELECT ordinal FROM rollout WHERE queue_position IS NOT NULL ORDER BY queue_position LIMIT 1)
GROUP BY rollout.ordinal;

-- name: known_rollout_ids
SELECT rollout_id FROM rollout WHERE rollout_id IN (…);

-- name: insert_rollouts
INSERT INTO rollout (
    ordinal, rollout_id, status, start_time, end_time, mode, resources_id, config, applied, attempts, revision,
    queue_position, deadline
) VALUES …;

-- name: insert_payloads
INSERT INTO rollout_payload (ordinal, input, metadata) VALUES …;

-- name: due_rollouts
SELECT rollout_id FROM rollout WHERE deadline < ? ORDER BY deadline LIMIT ?;

-- name: first_deadline
SELECT deadline FROM rollout WHERE deadline IS NOT NULL ORDER BY deadline LIMIT 1;

-- name: attempts
SELECT
    rollout, attempt_id, sequence_id, status, start_time, end_time, worker_id, instance_id, last_heartbeat_time,
    metadata, last_span_sequence_id
FROM attempt WHERE rollout IN (…) ORDER BY rollout, sequence_id;

-- name: insert_attempts
INSERT INTO attempt (
    rollout, attempt_id, sequence_id, status, start_time, end_time, worker_id, instance_id, last_heartbeat_time,
    metadata, last_span_sequence_id
) VALUES …;

-- name: known_span_ids
SELECT span_id FROM span WHERE rollout = ? AND attempt = ? AND span_id IN (…);

-- name: insert_spans
INSERT INTO span (rollout, attempt, span_id, sequence_id, payload) VALUES …;

-- name: spans_of_attempt
SELECT span.sequence_id, span.ordinal, span.span_id, span.payload
FROM attempt
JOIN rollout ON rollout.ordinal = attempt.rollout
JOIN span ON span.rollout = attempt.rollout AND span.attempt = attempt.sequence_id
WHERE attempt.attempt_id = ? AND rollout.rollout_id = ?;

-- name: newest_version
SELECT max(version) FROM resources WHERE resources_id = ?;

-- name: insert_resources
INSERT INTO resources (resources_id, version, create_time, update_time, request_digest) VALUES (?, ?, ?, ?, ?);

-- name: insert_resource
INSERT INTO resource (resources, position, name, fields) VALUES …;

-- name: resources_by_version
SELECT * FROM resources WHERE resources_id = ? AND version = ?;

-- name: newest_resources
SELECT * FROM resources WHERE resources_id = ? ORDER BY version DESC LIMIT 1;

-- name: latest_resources
SELECT * FROM resources ORDER BY ordinal DESC LIMIT 1;

-- name: all_resources
SELECT * FROM resources ORDER BY ordinal;

-- name: fields_of_resources
SELECT name, fields FROM resource WHERE resources = ? ORDER BY position;

-- name: worker_by_id
SELECT * FROM worker WHERE worker_id = ?;

-- name: all_workers
SELECT * FROM worker ORDER BY ordinal;

-- name: insert_workers
INSERT INTO worker (
    ordinal, worker_id, heartbeat_stats, last_heartbeat_time, last_dequeue_time, last_busy_time, last_idle_time,
    silent_after_seconds, leases
) VALUES …;

-- name: forget_wanted
DELETE FROM temp.wanted;

-- name: insert_wanted
INSERT OR IGNORE INTO temp.wanted (rollout_id) VALUES …;

-- name: counters
SELECT name, value FROM counter;

-- name: save_counter
INSERT OR REPLACE INTO counter (name, value) VALUES (?, ?);

-- name: ended_first
SELECT ordinal, rollout_id, status FROM rollout INDEXED BY rollout_by_end
WHERE status IN ('succeeded', 'failed', 'cancelled') AND deadline IS NULL AND end_time < ?
ORDER BY end_time LIMIT ?;

-- name: statuses_of_attempts
SELECT status FROM attempt WHERE rollout IN (…);

-- name: delete_rollouts
DELETE FROM rollout WHERE ordinal IN (…);

-- name: delete_payloads
DELETE FROM rollout_payload WHERE ordinal IN (…);

-- name: delete_attempts
DELETE FROM attempt WHERE rollout IN (…);

-- name: insert_dropped
INSERT OR REPLACE INTO dropped (ordinal, rollout, rollout_id, has_spans) VALUES …;

-- name: dropped_rollout
SELECT ordinal FROM dropped WHERE rollout_id = ?;

-- name: spans_of_dropped
SELECT span.ordinal, length(span.payload)
FROM dropped CROSS JOIN span ON span.rollout = dropped.rollout
WHERE dropped.has_spans = 1 LIMIT ?;

-- name: delete_spans
DELETE FROM span WHERE ordinal IN (…);

-- name: note_spans_deleted
UPDATE dropped SET has_spans = 0 WHERE has_spans = 1;

-- name: forget_dropped
DELETE FROM dropped WHERE ordinal <= ? AND has_spans = 0;
