-- Version 1. Times are seconds since the epoch. JSON payloads and spans are blobs, encoded by those who made them.

CREATE TABLE rollout (
    ordinal INTEGER PRIMARY KEY, -- order of creation; never given twice
    rollout_id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    start_time REAL NOT NULL,
    end_time REAL,
    mode TEXT,
    resources_id TEXT,
    config TEXT NOT NULL, -- JSON: [timeout_seconds, unresponsive_seconds, max_attempts, [retry_condition, …]]
    applied TEXT, -- JSON: [[request_digest, value], …], oldest first
    attempts INTEGER NOT NULL, -- how many rows of `attempt` it has
    revision INTEGER NOT NULL,
    queue_position INTEGER, -- set while it waits in the queue
    deadline REAL -- when the first of its open attempts is due to be closed
);

CREATE UNIQUE INDEX rollout_by_queue_position ON rollout (queue_position) WHERE queue_position IS NOT NULL;

CREATE INDEX rollout_by_deadline ON rollout (deadline) WHERE deadline IS NOT NULL;

CREATE INDEX rollout_by_status ON rollout (status); -- and, as in every index, by ordinal within a status

-- Apart from `rollout`, whose rows are rewritten at every change: these are large and hardly ever change.
CREATE TABLE rollout_payload (
    ordinal INTEGER PRIMARY KEY, -- as in `rollout`
    input BLOB NOT NULL,
    metadata BLOB
);

-- A rollout as it is read; the code relies on the order of these columns.
CREATE VIEW stored_rollout AS
SELECT
    rollout.ordinal,
    rollout.queue_position,
    rollout.attempts,
    rollout.rollout_id,
    rollout_payload.input,
    rollout.status,
    rollout.start_time,
    rollout.config,
    rollout.mode,
    rollout.resources_id,
    rollout_payload.metadata,
    rollout.end_time,
    rollout.applied,
    rollout.revision
FROM rollout
JOIN rollout_payload ON rollout_payload.ordinal = rollout.ordinal;

CREATE TABLE attempt (
    rollout INTEGER NOT NULL, -- its ordinal
    sequence_id INTEGER NOT NULL,
    attempt_id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    start_time REAL NOT NULL,
    end_time REAL,
    worker_id TEXT,
    instance_id TEXT,
    last_heartbeat_time REAL,
    metadata BLOB,
    last_span_sequence_id INTEGER NOT NULL,
    PRIMARY KEY (rollout, sequence_id)
) WITHOUT ROWID;

CREATE TABLE span (
    ordinal INTEGER PRIMARY KEY, -- order of arrival
    rollout INTEGER NOT NULL, -- its ordinal
    attempt INTEGER NOT NULL, -- its sequence id
    span_id TEXT NOT NULL,
    sequence_id INTEGER NOT NULL,
    payload BLOB NOT NULL -- a lightningpb.v1.Span
);

CREATE UNIQUE INDEX span_by_attempt ON span (rollout, attempt, span_id);

CREATE TABLE resources (
    ordinal INTEGER PRIMARY KEY, -- order of publication
    resources_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    create_time REAL NOT NULL,
    update_time REAL NOT NULL,
    request_digest TEXT,
    UNIQUE (resources_id, version)
);

CREATE TABLE resource (
    resources INTEGER NOT NULL, -- the ordinal of the version it belongs to
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    fields BLOB NOT NULL, -- a JSON object
    PRIMARY KEY (resources, position)
) WITHOUT ROWID;

CREATE TABLE worker (
    ordinal INTEGER PRIMARY KEY, -- order of creation
    worker_id TEXT NOT NULL UNIQUE,
    heartbeat_stats BLOB,
    last_heartbeat_time REAL,
    last_dequeue_time REAL,
    last_busy_time REAL,
    last_idle_time REAL,
    silent_after_seconds REAL,
    leases TEXT NOT NULL -- JSON: [[rollout_id, attempt_id, instance_id], …], oldest first
);

-- Numbers of the whole store, kept so that nothing has to be counted.
CREATE TABLE counter (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;
