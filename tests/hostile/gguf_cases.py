"""Malformed and borderline GGUF files, byte by byte; the numbers are rows of the catalogue of bad files."""

from __future__ import annotations

import struct

from hostile import Case

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
T_F32, T_F16, T_Q4_0, T_Q8_0, T_I8 = 0, 1, 2, 8, 24
TOP = (1 << 64) - 1


def u32(n: int) -> bytes:
    return struct.pack("<I", n & 0xFFFFFFFF)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n & TOP)


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return u64(len(value)) + value


def header(n_tensors: int, n_kv: int, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(n_tensors) + u64(n_kv)


def kv(key: bytes | str, value_type: int, value: bytes) -> bytes:
    return text(key) + u32(value_type) + value


def info(name: bytes | str, ne: tuple[int, ...], type_id: int = T_F32, offset: int = 0) -> bytes:
    return text(name) + u32(len(ne)) + b"".join(u64(d) for d in ne) + u32(type_id) + u64(offset)


def pad(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def one(name: bytes | str = "t", ne: tuple[int, ...] = (8,), type_id: int = T_F32, offset: int = 0,
        data: bytes = b"", kvs: bytes = b"", n_kv: int = 0) -> bytes:  # fmt: skip
    """A file with one tensor; `data` follows the padded header."""
    return pad(header(1, n_kv) + kvs + info(name, ne, type_id, offset)) + data


def with_kv(pair: bytes) -> bytes:
    return pad(header(0, 1) + pair)


def tensors(*infos: bytes, data: bytes = b"") -> bytes:
    return pad(header(len(infos), 0) + b"".join(infos)) + data


def aligned(value_type: int, value: bytes, tensor: bool = False) -> bytes:
    pair = kv("general.alignment", value_type, value)
    return one(kvs=pair, n_kv=1, data=bytes(32)) if tensor else with_kv(pair)


GOOD = one(data=bytes(32))

MALFORMED = [
    Case("G1_empty_file", b"", "TruncatedFile"),
    Case("G2_one_byte", b"G", "TruncatedFile"),
    Case("G3_magic_only", b"GGUF", "TruncatedFile"),
    Case("G4_bad_magic", b"FUGG" + bytes(20), "BadMagic"),
    Case("G5_ggjt_legacy_magic", b"tjgg" + bytes(20), "BadMagic"),
    Case("G6_version_0", pad(header(0, 0, 0)), "UnsupportedVersion"),
    Case("G7_version_1", pad(header(0, 0, 1)), "UnsupportedVersion"),
    Case("G8_version_4", pad(header(0, 0, 4)), "UnsupportedVersion"),
    Case("G9_big_endian_v3", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "WrongEndianness"),
    Case("G10_truncated_counts", header(0, 0)[:16], "TruncatedFile"),
    Case("G11_n_kv_minus1", pad(header(0, TOP)), "LimitExceeded"),
    Case("G12_n_tensors_minus1", pad(header(TOP, 0)), "LimitExceeded"),
    Case("G13_n_tensors_2p31", pad(header(1 << 31, 0)), "LimitExceeded"),
    Case("G14_n_kv_2p31_no_bytes", pad(header(0, 1 << 31)), "LimitExceeded"),
    Case("G14b_n_kv_within_limit_no_bytes", pad(header(0, 1000)), "TruncatedFile"),
    Case("G15_key_len_minus1", pad(header(0, 1) + u64(TOP) + b"abc" + bytes(8)), "LimitExceeded"),
    Case("G16_key_len_beyond_eof", header(0, 1) + u64(1 << 20) + b"abc" + bytes(8), "TruncatedFile"),
    Case("G16b_key_longer_than_allowed", with_kv(kv("k" * 65536, U32, u32(1))), "LimitExceeded"),
    Case("G17_key_empty", with_kv(kv("", U32, u32(1)) + bytes(9)), "BadText"),
    Case("G18_key_with_nul", with_kv(kv(b"a\0b", U32, u32(1))), "BadText"),
    Case("G19_key_not_utf8", with_kv(kv(b"\xff\xfe", U32, u32(1))), "BadText"),
    Case("G19b_key_not_ascii", with_kv(kv("schlüssel", U32, u32(1))), "BadText"),
    Case("G20_key_duplicate", pad(header(0, 2) + kv("a", U32, u32(1)) * 2), "DuplicateKey"),
    Case("G21_kv_type_13", with_kv(kv("a", 13, u32(1))), "BadType"),
    Case("G22_kv_type_minus1", with_kv(kv("a", -1, u32(1))), "BadType"),
    Case("G23_bool_2", with_kv(kv("a", BOOL, b"\2")), "BadValue"),
    Case("G23b_bool_2_in_array", with_kv(kv("a", ARR, u32(BOOL) + u64(3) + b"\0\1\2")), "BadValue"),
    Case("G24_kv_str_len_1GiB", with_kv(kv("a", STR, u64(1 << 30) + b"1234567")), "TruncatedFile"),
    Case("G25_kv_str_len_2p63", with_kv(kv("a", STR, u64(1 << 63))), "LimitExceeded"),
    Case("G25b_kv_str_not_utf8", with_kv(kv("a", STR, text(b"\xc3("))), "BadText"),
    Case("G26_arr_len_2p60_u8", with_kv(kv("a", ARR, u32(U8) + u64(1 << 60))), "TruncatedFile"),
    Case("G27_arr_len_2p30_str", with_kv(kv("a", ARR, u32(STR) + u64(1 << 30))), "TruncatedFile"),
    Case("G28_arr_len_minus1", with_kv(kv("a", ARR, u32(U64) + u64(TOP))), "TruncatedFile"),
    Case("G28b_arr_str_len_minus1", with_kv(kv("a", ARR, u32(STR) + u64(1) + u64(TOP))), "LimitExceeded"),
    Case("G28c_arr_str_beyond_eof", with_kv(kv("a", ARR, u32(STR) + u64(1) + u64(1 << 20))), "TruncatedFile"),
    Case("G28d_arr_str_not_utf8", with_kv(kv("a", ARR, u32(STR) + u64(1) + text(b"\xff"))), "BadText"),
    Case("G29_arr_nested", pad(with_kv(kv("a", ARR, u32(ARR) + u64(1) + u32(U8) + u64(1) + b"\0")), 96), "BadType"),
    Case("G30_arr_nested_deep", with_kv(kv("a", ARR, (u32(ARR) + u64(1)) * 5000)), "BadType"),
    Case("G31_arr_elem_type_13", with_kv(kv("a", ARR, u32(13) + u64(1))), "BadType"),
    Case("G32_align_0", aligned(U32, u32(0)), "BadValue"),
    Case("G33_align_13", aligned(U32, u32(13)), "BadValue"),
    Case("G33b_align_4", aligned(U32, u32(4)), "BadValue"),
    Case("G33c_align_24", aligned(U32, u32(24)), "BadValue"),
    Case("G34_align_i32", aligned(I32, u32(32)), "BadType"),
    Case("G35_align_string", aligned(STR, text("32")), "BadType"),
    Case("G36_align_array", aligned(ARR, u32(U32) + u64(1) + u32(32)), "BadType"),
    Case("G37_align_array_empty", aligned(ARR, u32(U32) + u64(0)), "BadType"),
    Case("G37b_align_u64", aligned(U64, u64(32)), "BadType"),
    Case("G37c_align_bool", aligned(BOOL, b"\1"), "BadType"),
    Case("G38_align_2p31", aligned(U32, u32(1 << 31)), "BadValue"),
    Case("G39_align_2p31_with_tensor", aligned(U32, u32(1 << 31), tensor=True), "BadValue"),
    Case("G41_name_1GiB_claim", pad(header(1, 0) + u64(1 << 30) + bytes(32)), "LimitExceeded"),
    Case("G41b_name_5000_bytes", one("n" * 5000, data=bytes(32)), "LimitExceeded"),
    Case("G42_name_empty", one("", data=bytes(32)), "BadText"),
    Case("G43_name_with_newline", one("a\nb", data=bytes(32)), "BadText"),
    Case("G44_name_not_utf8", one(b"\xff", data=bytes(32)), "BadText"),
    Case("G45_name_duplicate", tensors(info("t", (8,)), info("t", (8,), offset=32), data=bytes(64)), "DuplicateTensor"),
    Case(
        "G46_name_duplicate_after_nul",
        tensors(info(b"t\0a", (8,)), info(b"t\0b", (8,), offset=32), data=bytes(64)),
        "BadText",
    ),
    Case("G47_n_dims_5", one(ne=(1, 1, 1, 1, 1), data=bytes(32)), "BadShape"),
    Case("G48_n_dims_minus1", pad(header(1, 0) + text("t") + u32(-1) + bytes(40)), "BadShape"),
    Case("G49_dim_minus1", one(ne=(-1,)), "BadShape"),
    Case("G50_dim_zero_then_huge", one(ne=(0, 1 << 62, 1 << 62)), "BadShape"),
    Case("G51_ne_2p33_sq", one(ne=(1 << 33, 1 << 33)), "Overflow"),
    Case("G52_ne_product_wraps_to_0", one(ne=(1 << 32, 1 << 32)), "Overflow"),
    Case("G53_ne_product_wraps_to_1", one(ne=((1 << 32) + 1, (1 << 32) - 1)), "Overflow"),
    Case("G54_ne_product_wraps_to_0_4d", one(ne=(65536,) * 4, type_id=T_I8), "Overflow"),
    Case("G55_nbytes_wraps_i64", one(ne=(1 << 31, 1 << 31)), "Overflow"),
    Case("G56_nbytes_pad_wraps", one(ne=((1 << 62) - 4, 1)), "Overflow"),
    Case("G57_q4_0_row_not_multiple", one(ne=(31, 2), type_id=T_Q4_0, data=bytes(36)), "BadShape"),
    Case("G58_type_4_removed", one(type_id=4, data=bytes(32)), "BadType"),
    Case("G59_type_removed_31", one(type_id=31, data=bytes(32)), "BadType"),
    Case("G60_type_1000", one(type_id=1000, data=bytes(32)), "BadType"),
    Case("G61_type_minus1", one(type_id=-1, data=bytes(32)), "BadType"),
    Case("G62_offset_minus1", one(offset=TOP), "OutOfBounds"),
    Case("G63_offset_unaligned", one(offset=16, data=bytes(64)), "Misaligned"),
    Case("G64_offset_gap", one(offset=64, data=bytes(96)), "Gap"),
    Case("G65_offset_overlap", tensors(info("a", (8,)), info("b", (8,)), data=bytes(64)), "Overlap"),
    Case("G66_offset_2p63", one(offset=1 << 63), "OutOfBounds"),
    Case("G67_data_short_1_byte", one(ne=(16,), data=bytes(63)), "TruncatedFile"),
    Case("G68_data_absent", one(ne=(16,)), "TruncatedFile"),
    Case("G69_data_absent_no_pad", header(1, 0) + info("t", (8,)), "TruncatedFile"),
    Case("G70_infos_truncated", header(2, 0) + info("t", (8,)), "TruncatedFile"),
    Case(
        "G71_two_tensors_size_sum_wraps",
        tensors(info("a", ((1 << 63) - 64,), T_I8), info("b", ((1 << 63) - 64,), T_I8, (1 << 63) - 64)),
        "Overflow",
    ),
    Case("G72_trailing_bytes", GOOD + b"PK\3\4" + bytes(60), "TrailingBytes"),
]

_SCALAR_BYTES = {U8: 1, I8: 1, BOOL: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, U64: 8, I64: 8, F64: 8}

ACCEPTED = {
    "empty_model": pad(header(0, 0)),
    "one_f32": GOOD,
    "version_2": pad(header(1, 0, 2) + info("t", (8,))) + bytes(32),
    "custom_alignment_64": pad(header(1, 1) + kv("general.alignment", U32, u32(64)) + info("t", (8,)), 64) + bytes(64),
    "rank_0": one(ne=(), data=bytes(4)),
    "zero_dim": one(ne=(4, 0)),
    "zero_dim_without_padding": one(ne=(4, 0))[:-1],
    "zero_between": tensors(info("a", (8,)), info("z", (0,), offset=32), info("b", (8,), offset=32), data=bytes(64)),
    "empty_array": with_kv(kv("a", ARR, u32(STR) + u64(0))),
    "q8_0_row_of_0": one(ne=(0, 3), type_id=T_Q8_0),
    "no_final_padding": one(ne=(5,), data=bytes(20)),
    "unordered": tensors(info("b", (8,), offset=32), info("a", (8,)), data=bytes(64)),
    "G40_name_64_bytes": one("n" * 64, data=bytes(32)),
    "name_not_ascii": one("größe", data=bytes(32)),
    "value_with_newlines": with_kv(kv("tokenizer.chat_template", STR, text("{%\n%}\t"))),
    "every_scalar": pad(
        header(0, 12)
        + kv("k", STR, text("x"))
        + b"".join(kv(f"k{kind}", kind, bytes(n)) for kind, n in _SCALAR_BYTES.items())
    ),
}
