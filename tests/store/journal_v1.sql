-- journal.db as version 1 of its schema wrote it.
CREATE TABLE events (
    id INTEGER PRIMARY KEY, ts_ms INTEGER NOT NULL, type TEXT NOT NULL, level TEXT NOT NULL, pool_id TEXT, human TEXT NOT NULL,
    fields TEXT NOT NULL
) STRICT;
CREATE TABLE operations (begun INTEGER PRIMARY KEY, operation_id TEXT NOT NULL UNIQUE, body TEXT NOT NULL) STRICT;
INSERT INTO events VALUES (1, 1795000000001, 'crash', 'error', 'p', 'It fell', '{"exit_code":3}');
INSERT INTO events VALUES (2, 1795000000002, 'backoff', 'warn', 'p', 'Again soon', '{"backoff_ms":1000}');
INSERT INTO operations VALUES (1, 'op-1', '{"operation_id":"op-1","status":"succeeded"}');
PRAGMA user_version=1;
