"""Malformed and borderline safetensors files; the numbers are rows of the catalogue of bad files."""

from __future__ import annotations

import json
import struct

from hostile import Case


def raw(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16), data: bytes = bytes(16)) -> bytes:
    return raw(json.dumps({"t": entry(dtype, shape, offsets)}), data)


def several(table: dict[str, object], data: bytes) -> bytes:
    return raw(json.dumps(table), data)


E16 = '{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
GOOD = one()

MALFORMED = [
    Case("S1_empty_file", b"", "TruncatedFile"),
    Case("S2_seven_bytes", bytes(7), "TruncatedFile"),
    Case("S3_n_0", bytes(8), "BadHeader"),
    Case("S4_n_1_brace", raw("{"), "BadHeader"),
    Case("S5_n_beyond_eof", struct.pack("<Q", 60), "TruncatedFile"),
    Case("S6_n_100MB_plus", raw("{}", length=100_000_001), "LimitExceeded"),
    Case("S7_n_2p63", raw("{}", length=1 << 63), "LimitExceeded"),
    Case("S8_n_minus1", raw("{}", length=(1 << 64) - 1), "LimitExceeded"),
    Case("S9_n_2p64m8_wraps", raw("{}", length=(1 << 64) - 8), "LimitExceeded"),
    Case("S10_header_not_utf8", raw(b"\xff"), "BadText"),
    Case("S11_header_bom", raw(b"\xef\xbb\xbf{}"), "BadHeader"),
    Case("S12_header_utf16", raw("{}".encode("utf-16-le")), "BadHeader"),
    Case("S13_header_list", raw("[]  "), "BadHeader"),
    Case("S14_header_null", raw("null"), "BadHeader"),
    Case("S15_header_number", raw("1   "), "BadHeader"),
    Case("S16_header_trailing_garbage", raw("{}x"), "BadHeader"),
    Case("S17_header_trailing_nul", raw("{}\0\0"), "BadHeader"),
    Case("S18_header_trailing_newline", raw("{}\n\n"), "BadHeader"),
    Case("S19_header_deep_nesting", raw("[" * 100_000), "BadHeader"),
    Case("S19b_header_deep_objects", raw('{"a":' * 100_000), "BadHeader"),
    Case("S20_header_NaN", raw('{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), "BadHeader"),
    Case("S20b_header_1e999", raw('{"t":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', bytes(4)), "BadShape"),
    Case(
        "S20c_huge_integer", raw('{"t":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}'), "BadHeader"
    ),
    Case("S21_dup_key_same", raw(f'{{"t":{E16},"t":{E16}}}', bytes(16)), "DuplicateKey"),
    Case("S22_dup_key_diff_shape", raw(f'{{"t":{E16},"t":{E16.replace("[2,2]", "[4]")}}}', bytes(16)), "DuplicateKey"),
    Case("S23_dup_key_by_escape", raw(f'{{"t":{E16},"\\u0074":{E16}}}', bytes(16)), "DuplicateKey"),
    Case("S24_dup_field_dtype", raw('{"t":{"dtype":"F32",' + E16[1:] + "}", bytes(16)), "DuplicateKey"),
    Case("S25_dup_metadata", raw('{"__metadata__":{},"__metadata__":{}}'), "DuplicateKey"),
    Case("S26_missing_dtype", several({"t": {"shape": [4], "data_offsets": [0, 16]}}, bytes(16)), "BadHeader"),
    Case("S27_missing_shape", several({"t": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)), "BadHeader"),
    Case("S28_missing_offsets", several({"t": {"dtype": "F32", "shape": [4]}}, bytes(16)), "BadHeader"),
    Case("S28b_unknown_field", several({"t": {**entry(), "x": 1}}, bytes(16)), "BadHeader"),
    Case("S28c_entry_is_list", several({"t": [1, 2, 3]}, bytes(16)), "BadHeader"),
    Case("S29_dtype_unknown", one("F33"), "BadType"),
    Case("S30_dtype_lower", one("f32"), "BadType"),
    Case("S31_dtype_number", one(1), "BadType"),
    Case("S31b_dtype_list", one(["F32"]), "BadType"),
    Case("S32_dtype_f4_odd", one("F4", [3], [0, 2], bytes(2)), "Misaligned"),
    Case("S33_shape_negative", one(shape=[-2, -2]), "BadShape"),
    Case("S34_shape_float", one(shape=[2.0, 2]), "BadShape"),
    Case("S35_shape_string", one(shape=["2", "2"]), "BadShape"),
    Case("S35b_shape_is_string", one(shape="22"), "BadShape"),
    Case("S36_shape_bool", one(shape=[True, 4]), "BadShape"),
    Case("S37_shape_nested", one(shape=[[2], 2]), "BadShape"),
    Case("S38_rank_9", one(shape=[1] * 8 + [4]), "BadShape"),
    Case("S38b_rank_300k", one(shape=[9] * 300_000), "BadShape"),
    Case("S38c_rank_1000_of_4000_digits", raw('{"t":{"dtype":"F32","shape":[' + ",".join(["9" * 4000] * 1000) +
                                              '],"data_offsets":[0,16]}}', bytes(16)), "BadShape"),
    Case("S39_shape_overflow_bits", one("I32", [2, (1 << 63) - 1]), "Overflow"),
    Case("S40_shape_2p64", one(shape=[1 << 64]), "BadShape"),
    Case(
        "S41_shape_zero_times_huge", one(shape=[0, (1 << 64) - 1, (1 << 64) - 1], offsets=[0, 0], data=b""), "BadShape"
    ),
    Case("S41b_shape_zero_times_2p40", one(shape=[0, 1 << 40], offsets=[0, 0], data=b""), "BadShape"),
    Case("S42_offsets_reversed", one(offsets=[16, 0]), "OutOfBounds"),
    Case("S43_offsets_negative", one(offsets=[-16, 0]), "OutOfBounds"),
    Case("S44_offsets_one", one(offsets=[0]), "BadHeader"),
    Case("S45_offsets_three", one(offsets=[0, 16, 16]), "BadHeader"),
    Case("S46_offsets_beyond_eof", one(offsets=[0, 16384]), "TruncatedFile"),
    Case("S46b_offsets_2p64", one(offsets=[0, 1 << 64]), "OutOfBounds"),
    Case("S46c_offsets_4300_digits", one(offsets=[0, 10**4300 - 1]), "OutOfBounds"),
    Case("S47_offsets_size_mismatch", one(offsets=[0, 4], data=bytes(4)), "SizeMismatch"),
    Case("S48_offsets_hole_at_start", one(offsets=[4, 20], data=bytes(20)), "Gap"),
    Case("S49_offsets_hole_middle", several({"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36)), "Gap"),
    Case("S50_offsets_overlap", several({"a": entry(), "b": entry()}, bytes(16)), "Overlap"),
    Case("S51_offsets_partial_overlap", several({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)), "Overlap"),
    Case("S52_overlap_bomb_10k", several({f"t{i}": entry() for i in range(10_000)}, bytes(16)), "Overlap"),
    Case("S53_offsets_strings", one(offsets=["0", "16"]), "BadHeader"),
    Case("S53b_offsets_bool", one("U8", [1], [False, True], bytes(1)), "BadHeader"),
    Case(
        "S54_offsets_exp", raw('{"t":{"dtype":"F32","shape":[2,2],"data_offsets":[0,1.6e1]}}', bytes(16)), "BadHeader"
    ),
    Case("S55_trailing_bytes", GOOD + b"PK\3\4", "TrailingBytes"),
    Case("S56_data_short_2", GOOD[:-2], "TruncatedFile"),
    Case("S57_metadata_number", several({"__metadata__": {"a": 1}, "t": entry()}, bytes(16)), "BadHeader"),
    Case("S58_metadata_list", several({"__metadata__": ["a"], "t": entry()}, bytes(16)), "BadHeader"),
    Case("S59_metadata_as_tensor", several({"__metadata__": entry(), "t": entry()}, bytes(16)), "BadHeader"),
    Case("S60_name_lone_surrogate", raw('{"\\ud800":' + E16 + "}", bytes(16)), "BadText"),
    Case("S60a_metadata_lone_surrogate",
         raw('{"__metadata__":{"pyggml.config":"\\udfff"},"t":' + E16 + "}", bytes(16)), "BadText"),
    Case("S60b_name_empty", several({"": entry()}, bytes(16)), "BadText"),
    Case("S60c_name_with_escape", several({"\x1b[2J": entry()}, bytes(16)), "BadText"),
    Case("S61_name_1MB", several({"n" * 1_000_000: entry()}, bytes(16)), "LimitExceeded"),
    Case(
        "S63_too_many_tensors",
        several({f"{i:x}": entry("U8", (0,), (0, 0)) for i in range((1 << 17) + 1)}, b""),
        "LimitExceeded",
    ),
]

ACCEPTED = {
    "one": GOOD,
    "scalar": one(shape=[], offsets=[0, 4], data=bytes(4)),
    "empty_tensor": one(shape=[2, 0], offsets=[0, 0], data=b""),
    "no_tensors": raw("{}"),
    "metadata": several({"__metadata__": {"format": "pt", "größe": "x\ny"}, "t": entry()}, bytes(16)),
    "surrogate_pair": raw('{"\\ud83d\\ude00":' + E16 + "}", bytes(16)),
    "trailing_spaces": raw(f'{{"t":{E16}}}    ', bytes(16)),
    "leading_space": raw(f'  {{"t":{E16}}}', bytes(16)),
    "empty_shares_offset": several({"a": entry(), "e": entry(shape=(0,), offsets=(16, 16)),
                                    "b": entry(offsets=(16, 32))}, bytes(32)),
    "S62_data_misaligned": raw(f'{{"t":{E16}}}' + " " * ((3 - len(E16) - 6) % 8 or 1), bytes(16)),
    "rank_8": one(shape=[1, 1, 1, 1, 1, 1, 2, 2]),
    "f4_even": one("F4", [4], [0, 2], bytes(2)),
    "fp8": one("F8_E4M3", [16]),
}  # fmt: skip
