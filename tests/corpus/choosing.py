"""Which statements are run, whoever wrote them: all but those that the relay does not carry by its contract, and
those that would harm the run itself. Pure."""

from __future__ import annotations

import re

_RULES: list[tuple[str, str]] = [
    (
        r"(CREATE|ALTER|DROP|RENAME)\s+(OR\s+REPLACE\s+)?(USER|ROLE)|GRANT|REVOKE|SET\s+(PASSWORD|ROLE|DEFAULT\s+ROLE)",
        "accounts belong to one server",
    ),
    (
        r"(CREATE|ALTER|DROP)\s+(OR\s+REPLACE\s+)?(DEFINER\s*=\s*\S+\s+)?(EVENT|SERVER|TABLESPACE|LOGFILE|UNDO)",
        "belongs to one server",
    ),
    (
        r"SHUTDOWN|KILL|FLUSH|RESET|PURGE|CHANGE|START\s+(ALL\s+)?(SLAVE|REPLICA|GROUP)|STOP|(UN)?INSTALL|RESTART",
        "works on the server",
    ),
    (r"BACKUP|CLONE|BINLOG|CACHE\s+INDEX|LOAD|IMPORT|USE|LOCK|UNLOCK|XA", "works on files or on other clients"),
    (r"(CREATE|ALTER|DROP)\s+(OR\s+REPLACE\s+)?(DATABASE|SCHEMA)", "another database"),
    (r"(SHOW|DESC|DESCRIBE|EXPLAIN|HELP|ANALYZE|CHECK|OPTIMIZE|REPAIR|CHECKSUM)\b", "changes no rows"),
]
_BEGINS = [(re.compile(rf"\s*(/\*.*?\*/\s*)*({rule})\b", re.IGNORECASE | re.DOTALL), reason) for rule, reason in _RULES]
_HOLDS = [
    (
        re.compile(r"\s*CREATE\b.*\b(TRIGGER|PROCEDURE|FUNCTION)\b.*\w/\*!", re.IGNORECASE | re.DOTALL),
        "MariaDB logs INSERT/*!INTO*/t as INSERTINTOt: no replica could run it",
    ),
    (
        re.compile(
            r"\bGLOBAL\b|\b(binlog_|sql_log|log_bin|gtid_|server_id|debug|default_storage_engine|storage_engine"
            r"|pseudo_|skip_replication)\w*",
            re.IGNORECASE,
        ),
        "changes the server, or what it logs",
    ),
    (re.compile(r"\b(SLEEP|BENCHMARK|GET_LOCK|WAIT_FOR\w*|MASTER_(GTID|POS)_WAIT)\s*\(", re.IGNORECASE), "waits"),
    (re.compile(r"\bINTO\s+(OUTFILE|DUMPFILE)\b|\bDATA\s+DIRECTORY\b|\bLOAD_FILE\b", re.IGNORECASE), "works on files"),
    (
        re.compile(
            r"\b(ENGINE|TYPE)\s*=?\s*['\"`]?(MYISAM|MEMORY|HEAP|ARIA|CSV|ARCHIVE|BLACKHOLE|MERGE|MRG_MYISAM|FEDERATED"
            r"|EXAMPLE|NDB\w*|SEQUENCE|MARIA|SPIDER|CONNECT|ROCKSDB|TOKUDB|S3|PARTITION|FALCON|BDB|BERKELEYDB|ISAM)\b",
            re.IGNORECASE,
        ),
        "an engine without transactions",
    ),
    (re.compile(r"\b`?(mysql|performance_schema|sys|mtr)`?\s*\.\s*[\w`]", re.IGNORECASE), "another database"),
]


def reason_to_skip(statement: str) -> str:
    """Why a statement is not run; empty where it is."""
    for pattern, reason in _BEGINS:
        if pattern.match(statement):
            return reason
    for pattern, reason in _HOLDS:
        if pattern.search(statement):
            return reason
    return ""
