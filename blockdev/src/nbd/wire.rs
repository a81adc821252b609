//! Constants of the NBD protocol (doc/proto.md of the NBD project) and this server's limits.

/// Server greeting, first half: "NBDMAGIC".
pub(super) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second half of the greeting and start of every option: "IHAVEOPT".
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;
pub(super) const CLIENT_FIXED_NEWSTYLE: u32 = 1 << 0;
pub(super) const CLIENT_NO_ZEROES: u32 = 1 << 1;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_STARTTLS: u32 = 5;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR | 1;
pub(super) const REP_ERR_POLICY: u32 = REP_ERROR | 2;
pub(super) const REP_ERR_INVALID: u32 = REP_ERROR | 3;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERROR | 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;
pub(super) const REP_ERR_TOO_BIG: u32 = REP_ERROR | 9;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_DESCRIPTION: u16 = 2;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const TRANSMISSION_HAS_FLAGS: u16 = 1 << 0;
pub(super) const TRANSMISSION_READ_ONLY: u16 = 1 << 1;
pub(super) const TRANSMISSION_SEND_FLUSH: u16 = 1 << 2;
pub(super) const TRANSMISSION_SEND_FUA: u16 = 1 << 3;
pub(super) const TRANSMISSION_SEND_TRIM: u16 = 1 << 5;
pub(super) const TRANSMISSION_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const TRANSMISSION_SEND_DF: u16 = 1 << 7;
pub(super) const TRANSMISSION_CAN_MULTI_CONN: u16 = 1 << 8;
pub(super) const TRANSMISSION_SEND_CACHE: u16 = 1 << 10;
pub(super) const TRANSMISSION_SEND_FAST_ZERO: u16 = 1 << 11;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_CACHE: u16 = 5;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub(super) const CMD_FLAG_DF: u16 = 1 << 2;
pub(super) const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
pub(super) const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

pub(super) const CHUNK_FLAG_DONE: u16 = 1 << 0;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_OFFSET_DATA: u16 = 1;
pub(super) const CHUNK_OFFSET_HOLE: u16 = 2;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR: u16 = (1 << 15) + 1;

pub(super) const STATE_HOLE: u32 = 1 << 0;
pub(super) const STATE_ZERO: u32 = 1 << 1;

/// The one meta context of this server, and its id.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";
pub(super) const BASE_ALLOCATION_ID: u32 = 1;

pub(super) const REQUEST_BYTES: usize = 28;
pub(super) const SIMPLE_REPLY_BYTES: usize = 16;
pub(super) const CHUNK_HEADER_BYTES: usize = 20;

/// Block sizes advertised: any byte range is served, whole blocks of 4 KiB are fastest.
pub(super) const BLOCK_BYTES_MIN: u32 = 1;
pub(super) const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Largest payload of one request in either direction; advertised, and what common clients assume unasked.
pub(super) const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Longest name or query in the protocol.
pub(super) const NAME_BYTES_MAX: u32 = 4096;
/// Longest option body: a name and many queries. A longer one is answered with TOO_BIG and the connection closed.
pub(super) const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Options that one client may send before it must start; the next ends the connection.
pub(super) const OPTIONS_MAX: u32 = 256;
