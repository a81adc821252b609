//! The other end of the control socket: one request, one answer, with a deadline where a node that is well answers at once.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::ApiError;

/// A node that has not answered by then is stuck.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// What takes longer is told on a terminal.
const SAID_AFTER: Duration = Duration::from_secs(1);
/// Longest answer, in bytes: a group may have hundreds of thousands of points.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// The node would not do it as things are.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.error)]
pub(crate) struct Refusal(pub(crate) ApiError);

/// Asks the node at `socket`.
pub(crate) fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    call(socket, Method::GET, path, Vec::new())
}

/// Tells the node at `socket` to do something.
pub(crate) fn post<T: DeserializeOwned>(socket: &Path, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
    call(socket, Method::POST, path, serde_json::to_vec(body)?)
}

/// As [`post`], for what is answered when something has ended, however long that takes.
pub(crate) fn wait<T: DeserializeOwned>(socket: &Path, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let body = serde_json::to_vec(body)?;
    let (ok, bytes) = runtime.block_on(exchange(socket, Method::POST, path, body))?;
    answered(ok, &bytes)
}

/// As [`wait`]; on a terminal it says after a moment `what` is done meanwhile.
pub(crate) fn wait_for<T: DeserializeOwned>(socket: &Path, path: &str, body: &impl Serialize, what: &str) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let body = serde_json::to_vec(body)?;
    let answer = runtime.block_on(async {
        let mut exchange = std::pin::pin!(exchange(socket, Method::POST, path, body));
        if let Ok(answer) = tokio::time::timeout(SAID_AFTER, &mut exchange).await {
            return answer;
        }
        let is_shown = io::stderr().is_terminal();
        if is_shown {
            eprint!("{what} ...");
        }
        let answer = exchange.await;
        if is_shown {
            eprint!("\r\x1b[2K");
        }
        answer
    });
    let (ok, bytes) = answer?;
    answered(ok, &bytes)
}

/// `text` as a value of a query.
pub(crate) fn encoded(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/');
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

fn call<T: DeserializeOwned>(socket: &Path, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async { tokio::time::timeout(DEADLINE, exchange(socket, method, path, body)).await });
    let (ok, bytes) = answer.map_err(|_| {
        anyhow!("{}: the node did not answer within {} s: look at its log", socket.display(), DEADLINE.as_secs())
    })??;
    answered(ok, &bytes)
}

fn answered<T: DeserializeOwned>(ok: bool, bytes: &[u8]) -> anyhow::Result<T> {
    if !ok {
        let error: ApiError = serde_json::from_slice(bytes).context("the node refused, with an answer that is not JSON")?;
        if error.refused.is_some() {
            return Err(Refusal(error).into());
        }
        bail!("{}", error.error);
    }
    serde_json::from_slice(bytes).context("the node's answer is of another version of Twinsite: use the same for both")
}

async fn exchange(socket: &Path, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<(bool, Bytes)> {
    let stream = UnixStream::connect(socket).await.map_err(|error| unreachable(socket, &error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "twinsite")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await.context("the node went away")?;
    let ok = response.status().is_success();
    let bytes = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| anyhow!("the node's answer did not arrive whole: {error}"))?
        .to_bytes();
    driver.abort();
    Ok((ok, bytes))
}

fn unreachable(socket: &Path, error: &io::Error) -> anyhow::Error {
    let path = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            anyhow!("{path}: no node answers here: start it with twinsite run, or name its --config or --socket")
        }
        io::ErrorKind::PermissionDenied => anyhow!("{path}: permission denied: run this as the user of the node"),
        _ => anyhow!("{path}: cannot reach the node: {error}"),
    }
}
