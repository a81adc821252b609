//! As much of HTTP as it takes to ask a control socket: one GET a connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const PATIENCE: Duration = Duration::from_secs(10);
/// Larger answers are not believed.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// The body of `GET path`.
pub(crate) fn get(socket: &Path, path: &str) -> Result<Vec<u8>> {
    let failed = || format!("{}: the node does not answer GET {path}", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).with_context(failed)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").with_context(failed)?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).with_context(failed)?;
    body(&answer).with_context(failed).map(<[u8]>::to_vec)
}

/// What follows the head of an answer of status 200.
fn body(answer: &[u8]) -> Result<&[u8]> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("not HTTP")?;
    let (head, rest) = answer.split_at(end);
    let body = rest.get(4..).unwrap_or_default();
    let status = String::from_utf8_lossy(head).lines().next().unwrap_or_default().to_owned();
    if status.split(' ').nth(1) != Some("200") {
        bail!("{status}: {}", String::from_utf8_lossy(body).trim());
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_of_a_good_answer_only() {
        assert_eq!(body(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{}").unwrap(), b"{}");
        assert!(body(b"HTTP/1.1 404 Not Found\r\n\r\n{\"error\":\"x\"}").is_err());
        assert!(body(b"{}").is_err());
    }
}
