"""What the router knows of SQL functions. One that is not named here could be anything (an aggregate, or stored code
that reads other tables), so over several shards it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final


def names_of(text: str) -> frozenset[str]:
    """Names that are written one after the other."""
    return frozenset(text.split())


#: Many rows in, one value out.
AGGREGATES: Final = names_of(
    "aggregate_strings any_value avg bit_and bit_or bit_xor count group_concat json_arrayagg json_group_array "
    "json_group_object json_objectagg max min std stddev stddev_pop stddev_samp string_agg sum total var_pop var_samp "
    "variance"
)

#: One row in, one value out; the same value for the same arguments.
PURE: Final = names_of(
    "abs acos adddate addtime ascii asin atan atan2 bin bit_count bit_length ceil ceiling char char_length "
    "character_length coalesce concat concat_ws conv convert_tz cos cot crc32 date date_add date_format date_sub "
    "datediff day dayname dayofmonth dayofweek dayofyear degrees elt exp export_set field find_in_set floor format "
    "from_base64 from_days from_unixtime glob greatest hex hour if ifnull iif inet_aton inet_ntoa insert instr "
    "isnull json_array json_contains json_contains_path json_depth json_extract json_insert json_keys json_length "
    "json_merge_patch json_merge_preserve json_object json_overlaps json_quote json_remove json_replace json_search "
    "json_set json_type json_unquote json_valid json_value julianday last_day lcase least left length like ln locate "
    "log log10 log2 lower lpad ltrim make_set makedate maketime md5 microsecond mid minute mod month monthname nullif "
    "oct octet_length ord period_add period_diff pi position pow power printf quarter quote radians regexp_instr "
    "regexp_like regexp_replace regexp_substr repeat replace reverse right round rpad rtrim sec_to_time second sha1 "
    "sha2 sign sin soundex space sqrt strcmp strftime str_to_date subdate substr substring substring_index subtime "
    "tan time time_format time_to_sec timediff timestamp timestampadd timestampdiff to_base64 to_days to_seconds "
    "trim truncate typeof ucase unhex unicode unixepoch unix_timestamp upper uuid_to_bin bin_to_uuid week weekday "
    "weekofyear weight_string year yearweek"
)

#: One row in, one value out; another value every time, or on every server.
VOLATILE: Final = names_of(
    "curdate current_date current_time current_timestamp curtime default localtime localtimestamp now rand random "
    "random_bytes randomblob sysdate utc_date utc_time utc_timestamp uuid uuid_short"
)

#: Those of them whose value nobody can foresee.
RANDOM: Final = names_of("rand random random_bytes randomblob uuid uuid_short")

#: Clocks that are read by their name alone, without parentheses, and the word for a default, which may be one.
BARE_CLOCKS: Final = names_of(
    "current_date current_time current_timestamp default localtime localtimestamp utc_date utc_time utc_timestamp"
)

#: Functions that read the clock where an argument says no time of its own, and the place of this argument: without it,
#: and SQLite's also with the word 'now'.
CLOCKS_BY_ARGUMENT: Final[Mapping[str, int]] = {
    "date": 0,
    "julianday": 0,
    "strftime": 1,
    "time": 0,
    "unixepoch": 0,
    "unix_timestamp": 0,
}

#: What they answer belongs to one connection: they say nothing over several.
OF_THE_CONNECTION: Final = names_of(
    "connection_id found_rows get_lock is_free_lock is_used_lock last_insert_id last_insert_rowid changes "
    "release_all_locks release_lock row_count total_changes"
)

#: Those of them that tell of the statement before, wherever that has run.
OF_THE_STATEMENT_BEFORE: Final = names_of("changes found_rows last_insert_id last_insert_rowid row_count total_changes")

#: Functions whose value is a number whatever SQLAlchemy thinks of its type.
NUMERIC: Final = names_of(
    "abs ascii avg bit_count bit_length ceil ceiling char_length character_length count crc32 cume_dist datediff day "
    "dayofmonth dayofweek dayofyear dense_rank floor hour instr length locate microsecond minute mod month ntile "
    "octet_length percent_rank pow power quarter rank round row_number second sign sqrt strcmp sum time_to_sec "
    "timestampdiff to_days truncate unix_timestamp week weekday weekofyear year yearweek"
)

#: Functions whose text is never longer than their first argument.
NO_LONGER: Final = names_of("left lower ltrim max min right rtrim substr substring trim upper")
