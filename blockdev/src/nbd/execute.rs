//! Runs one valid request on a device to its end.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use super::error::Errno;
use super::pool::Pool;
use super::reply::Fragment;
use super::request::ValidRequest;
use crate::{BlockDevice, Buf, Extent, ExtentKind};

/// Reads at least this long ask for holes first: below, sending zeroes costs less than asking.
const HOLE_PROBE_BYTES_MIN: u32 = 64 << 10;
/// Pieces that one read may be answered in.
const FRAGMENTS_MAX: usize = 64;
/// Extents in one answer to BLOCK_STATUS; a client asks again for the rest. Bounds the time that one request takes.
const EXTENTS_MAX: usize = 256;

/// What to answer.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Success without data; a buffer to reuse.
    Done(Option<Buf>),
    Read {
        offset: u64,
        data: Buf,
    },
    Fragments {
        offset: u64,
        fragments: Vec<Fragment>,
    },
    Status {
        extents: Vec<Extent>,
        one: bool,
    },
    /// `chunk`: the command answers in chunks where structured replies were agreed on.
    Failed {
        errno: Errno,
        chunk: bool,
    },
}

pub(super) async fn execute(
    device: Arc<dyn BlockDevice>,
    pool: Rc<Pool>,
    request: ValidRequest,
    payload: Option<Buf>,
) -> Outcome {
    let chunk = matches!(request, ValidRequest::Read { .. } | ValidRequest::BlockStatus { .. });
    match run(device.as_ref(), &pool, request, payload).await {
        Ok(outcome) => outcome,
        Err(error) => {
            tracing::debug!(?request, %error, "request failed");
            Outcome::Failed { errno: Errno::of(&error), chunk }
        }
    }
}

async fn run(device: &dyn BlockDevice, pool: &Pool, request: ValidRequest, payload: Option<Buf>) -> io::Result<Outcome> {
    match request {
        ValidRequest::Read { offset, length, fragment } => {
            if fragment && length >= HOLE_PROBE_BYTES_MIN {
                let extents = device.extents(offset, u64::from(length), FRAGMENTS_MAX).await?;
                if extents.iter().any(|extent| extent.kind != ExtentKind::Data) {
                    return read_fragments(device, pool, offset, length, &extents).await;
                }
            }
            let data = read(device, pool, offset, length).await?;
            Ok(Outcome::Read { offset, data })
        }
        ValidRequest::Write { offset, length, fua } => {
            let mut back = payload;
            if length > 0 {
                let data = back.take().ok_or(io::ErrorKind::InvalidInput)?;
                back = Some(device.write(offset, data).await?);
            }
            sync_if(device, fua).await?;
            Ok(Outcome::Done(back))
        }
        ValidRequest::Flush => device.flush().await.map(|()| Outcome::Done(None)),
        ValidRequest::Trim { offset, length, fua } => {
            if length > 0 {
                device.trim(offset, u64::from(length)).await?;
            }
            sync_if(device, fua).await?;
            Ok(Outcome::Done(None))
        }
        ValidRequest::WriteZeroes { offset, length, mode, fua } => {
            if length > 0 {
                device.write_zeroes(offset, u64::from(length), mode).await?;
            }
            sync_if(device, fua).await?;
            Ok(Outcome::Done(None))
        }
        ValidRequest::Cache { offset, length } => {
            if length > 0 {
                device.cache(offset, u64::from(length)).await?;
            }
            Ok(Outcome::Done(None))
        }
        ValidRequest::BlockStatus { offset, length, one } => {
            let extents = device.extents(offset, u64::from(length), if one { 2 } else { EXTENTS_MAX }).await?;
            if extents.is_empty() {
                return Err(io::Error::other("device described no extents"));
            }
            Ok(Outcome::Status { extents, one })
        }
        // Ends the connection before it gets here.
        ValidRequest::Disconnect => Ok(Outcome::Done(None)),
    }
}

async fn sync_if(device: &dyn BlockDevice, fua: bool) -> io::Result<()> {
    if fua { device.flush().await } else { Ok(()) }
}

async fn read(device: &dyn BlockDevice, pool: &Pool, offset: u64, length: u32) -> io::Result<Buf> {
    let mut buf = pool.take(length as usize);
    if length == 0 {
        return Ok(buf);
    }
    match device.try_read(offset, &mut buf) {
        Some(result) => result.map(|()| buf),
        None => device.read(offset, buf).await,
    }
}

/// Holes as holes, everything else as data; what the extents leave out at the end is read.
async fn read_fragments(
    device: &dyn BlockDevice,
    pool: &Pool,
    offset: u64,
    length: u32,
    extents: &[Extent],
) -> io::Result<Outcome> {
    let mut runs: Vec<(bool, u32)> = Vec::new();
    let mut left = length;
    let tail = Extent { length: u64::MAX, kind: ExtentKind::Data };
    for extent in extents.iter().chain([&tail]) {
        let hole = extent.kind != ExtentKind::Data;
        let run = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
        left -= run;
        match runs.last_mut() {
            _ if run == 0 => {}
            Some((last, total)) if *last == hole => *total += run,
            _ => runs.push((hole, run)),
        }
    }
    let mut fragments = Vec::with_capacity(runs.len());
    let mut at = offset;
    for (hole, run) in runs {
        fragments.push(if hole { Fragment::Hole(run) } else { Fragment::Data(read(device, pool, at, run).await?) });
        at += u64::from(run);
    }
    Ok(Outcome::Fragments { offset, fragments })
}
