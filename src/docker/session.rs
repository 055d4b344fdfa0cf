//! The streams of a process, over a connection that was HTTP before: docker's "hijacking".
//! On a terminal bytes as they are; else each piece of output after eight bytes, which say
//! of which stream it is and how long.

use crate::engine::{Input, Logs, Output, Session};
use crate::server::Seat;
use crate::version::Version;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// What is read of a client at once, in bytes.
const PIECE: usize = 32 << 10;

/// Which of a session's outputs a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

/// The version from which on what is not of a terminal has a type of its own.
const MULTIPLEXED: Version = Version::new(1, 42);

/// The answer that a session comes behind; `before` is said first.
pub(crate) fn answer(
    mut request: Request,
    version: Version,
    session: Session,
    wanted: Wanted,
    before: Option<Logs>,
) -> Response {
    let kind = content_type(version, session.tty);
    if !is_upgrade(request.headers()) {
        // Nothing can be heard of this one.
        let Session { tty, output, .. } = session;
        return (
            [(CONTENT_TYPE, kind)],
            output_body(tty, before, output, wanted),
        )
            .into_response();
    }
    let seat = request.extensions_mut().remove::<Seat>();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _seat = seat;
        match upgrade.await {
            Ok(connection) => attend(TokioIo::new(connection), session, wanted, before).await,
            Err(error) => log::debug!("a client has gone before its session: {error}"),
        }
    });
    let headers = [
        (CONTENT_TYPE, kind),
        (CONNECTION, "Upgrade"),
        (UPGRADE, "tcp"),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// What a log, or any other output, is in an answer's body.
pub(crate) fn logs(version: Version, logs: Logs, wanted: Wanted) -> Response {
    let body = output_body(logs.tty, None, logs.lines, wanted);
    ([(CONTENT_TYPE, content_type(version, logs.tty))], body).into_response()
}

fn content_type(version: Version, tty: bool) -> &'static str {
    if tty || version < MULTIPLEXED {
        "application/vnd.docker.raw-stream"
    } else {
        "application/vnd.docker.multiplexed-stream"
    }
}

fn is_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(UPGRADE)
}

fn output_body(
    tty: bool,
    before: Option<Logs>,
    output: mpsc::Receiver<Output>,
    wanted: Wanted,
) -> Body {
    let before = stream::iter(before).flat_map(|logs| received(logs.lines));
    let framed = before
        .chain(received(output))
        .filter_map(move |output| async move { frame(tty, wanted, output) });
    Body::from_stream(framed.map(Ok::<Bytes, Infallible>))
}

fn received<T>(from: mpsc::Receiver<T>) -> impl stream::Stream<Item = T> {
    stream::unfold(from, |mut from| async move {
        let next = from.recv().await?;
        Some((next, from))
    })
}

/// A piece of output as it is sent; nothing, if it is not wanted.
fn frame(tty: bool, wanted: Wanted, output: Output) -> Option<Bytes> {
    let (stream, bytes) = match output {
        Output::Stdout(bytes) if wanted.stdout => (1, bytes),
        Output::Stderr(bytes) if wanted.stderr => (2, bytes),
        Output::Stdout(_) | Output::Stderr(_) => return None,
    };
    if tty {
        return Some(bytes);
    }
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes();
    let header = [stream, 0, 0, 0, len[0], len[1], len[2], len[3]];
    Some([&header[..], &bytes].concat().into())
}

/// Copies until the process has ended or the client has gone.
async fn attend<C>(connection: C, session: Session, wanted: Wanted, before: Option<Logs>)
where
    C: AsyncRead + AsyncWrite + Send + 'static,
{
    let (from, mut to) = tokio::io::split(connection);
    let Session {
        tty,
        mut output,
        input,
    } = session;
    let hearing = tokio::spawn(hear(from, input));
    let done = async {
        if let Some(mut logs) = before {
            say(&mut to, tty, wanted, &mut logs.lines).await?;
        }
        say(&mut to, tty, wanted, &mut output).await?;
        to.shutdown().await
    };
    if let Err(error) = done.await {
        log::debug!("a client has gone: {error}");
    }
    hearing.abort();
}

async fn say(
    to: &mut (impl AsyncWrite + Unpin),
    tty: bool,
    wanted: Wanted,
    output: &mut mpsc::Receiver<Output>,
) -> std::io::Result<()> {
    while let Some(output) = output.recv().await {
        if let Some(bytes) = frame(tty, wanted, output) {
            to.write_all(&bytes).await?;
            to.flush().await?;
        }
    }
    Ok(())
}

async fn hear(mut from: impl AsyncRead + Unpin, input: mpsc::Sender<Input>) {
    let mut buffer = vec![0; PIECE];
    loop {
        let next = match from.read(&mut buffer).await {
            Ok(0) => Input::End,
            Ok(count) => Input::Bytes(Bytes::copy_from_slice(&buffer[..count])),
            Err(error) => {
                log::debug!("a client has gone: {error}");
                Input::End
            }
        };
        let is_end = next == Input::End;
        if input.send(next).await.is_err() || is_end {
            return;
        }
    }
}

/// Objects, a line each, as they come.
pub(crate) fn lines(from: mpsc::Receiver<serde_json::Value>) -> Response {
    let lines = received(from).map(|value| Ok::<_, Infallible>(format!("{value}\n")));
    let body = Body::from_stream(lines);
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_framed_unless_it_is_a_terminals() {
        let both = Wanted {
            stdout: true,
            stderr: true,
        };
        let framed = |tty, wanted, output| frame(tty, wanted, output).map(|bytes| bytes.to_vec());
        let (out, err) = (Output::Stdout("hi".into()), Output::Stderr("no".into()));
        assert_eq!(
            framed(false, both, out.clone()).as_deref(),
            Some(&b"\x01\0\0\0\0\0\0\x02hi"[..])
        );
        assert_eq!(
            framed(false, both, err.clone()).as_deref(),
            Some(&b"\x02\0\0\0\0\0\0\x02no"[..])
        );
        assert_eq!(framed(true, both, out.clone()).as_deref(), Some(&b"hi"[..]));
        let none = Wanted {
            stdout: false,
            stderr: false,
        };
        assert_eq!(
            (framed(true, none, out), framed(false, none, err)),
            (None, None)
        );
    }
}
