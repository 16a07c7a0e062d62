-- Version 2: how many attempts are in each status is counted, as it is for rollouts.

INSERT INTO counter SELECT 'attempts.' || status, count(*) FROM attempt GROUP BY status;
