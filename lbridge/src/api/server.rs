//! server: the daemon's end of the control API. Turns requests into commands for the reconciler. Imports
//! planning.

use std::{
    convert::Infallible,
    fs, io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use axum::{
    Json, Router,
    body::Body,
    extract::{
        ConnectInfo, DefaultBodyLimit, Request, State, connect_info::Connected, rejection::JsonRejection,
    },
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::IncomingStream,
};
use futures_util::StreamExt as _;
use nix::{
    errno::Errno,
    unistd::{Gid, Group, chown},
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};

use super::{
    events::EventBus,
    protocol::{
        ALLOW, Allow, ApiError, DENY, Deny, EVENTS, EXPLAIN, ErrorCode, RELOAD, Reloaded, RuleStatus, STATUS,
        Status,
    },
};
use crate::planning::explain::{Explanation, Question};

/// The group whose members may use the socket; besides them only root may.
const GROUP: &str = "lbridge";

/// Maximum length of a request in bytes. A rule takes some 100 bytes of JSON, and there may be as many rules
/// as the kernel's map holds.
const MAX_BODY: usize = 32 * 1024 * 1024;

/// A request to the reconciler, with the channel for its answer.
#[derive(Debug)]
pub enum Command {
    /// Report the whole status.
    Status(oneshot::Sender<Result<Status, ApiError>>),
    /// Read the configuration again.
    Reload(oneshot::Sender<Result<Reloaded, ApiError>>),
    /// Add rules on behalf of the user with this uid; `None` if the uid is unknown.
    Allow(Allow, Option<u32>, oneshot::Sender<Result<Vec<RuleStatus>, ApiError>>),
    /// Remove rules on behalf of the user with this uid; `None` if the uid is unknown.
    Deny(Deny, Option<u32>, oneshot::Sender<Result<Vec<RuleStatus>, ApiError>>),
    /// Explain what would happen to a connection.
    Explain(Question, oneshot::Sender<Result<Explanation, ApiError>>),
}

/// The control socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    listener: Option<UnixListener>,
}

impl ControlSocket {
    /// Listens at `path`. Replaces a socket that a dead daemon left, but not that of a running daemon.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                bail!("{} exists and is not a socket; choose another path with --socket", path.display())
            }
            Ok(_) => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    bail!("an lbridge daemon listens at {} already", path.display());
                }
                fs::remove_file(path).with_context(|| format!("cannot replace {}", path.display()))?;
            }
            Err(_) => {}
        }
        // From the start only the daemon's own user may connect: the mode is widened only afterwards.
        let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        nix::sys::stat::umask(mask);
        let listener = bound.with_context(|| format!("cannot listen at {}", path.display()))?;
        if let Ok(Some(group)) = Group::from_name(GROUP) {
            match chown(path, None, Some(group.gid)) {
                Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o660))?,
                // A service manager that withholds the privilege may set the group itself; the unit does.
                Err(Errno::EPERM) => tracing::debug!(
                    path = %path.display(),
                    group = GROUP,
                    "control socket not given to the group: no privilege to do so"
                ),
                Err(error) => bail!("cannot give {} to {GROUP}: {error}", path.display()),
            }
        }
        Ok(Self { path: path.to_owned(), listener: Some(listener) })
    }

    /// Serves requests until dropped.
    pub async fn serve(mut self, commands: mpsc::Sender<Command>, news: EventBus) -> anyhow::Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let router = Router::new()
            .route(STATUS, get(status))
            .route(ALLOW, post(allow))
            .route(DENY, post(deny))
            .route(RELOAD, post(reload))
            .route(EXPLAIN, post(explain))
            .route(EVENTS, get(async move || events(&news)))
            .fallback(async || {
                failure(
                    ErrorCode::Usage,
                    "no such resource; there are /v1/status, /v1/allow, /v1/deny, /v1/reload, /v1/explain \
                     and /v1/events",
                )
            })
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .layer(middleware::from_fn(check_peer))
            .with_state(commands);
        axum::serve(listener, router.into_make_service_with_connect_info::<Peer>())
            .await
            .context("the control API ended")
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The other end of a connection, and whether it is permitted. The file's mode enforces the same; this check
/// still holds if somebody has changed the mode.
#[derive(Debug, Clone, Copy)]
struct Peer {
    permitted: bool,
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let stream = stream.io();
        let credentials = stream.peer_cred();
        let uid = credentials.as_ref().ok().map(tokio::net::unix::UCred::uid);
        let permitted = credentials.is_ok_and(|peer| {
            let lbridge = Group::from_name(GROUP).ok().flatten().map(|group| group.gid);
            let in_group = lbridge.is_some_and(|lbridge| {
                peer.gid() == lbridge.as_raw()
                    || peer_groups(stream).is_ok_and(|groups| groups.contains(&lbridge))
            });
            peer.uid() == 0 || in_group
        });
        Self { permitted, uid }
    }
}

/// Maximum number of groups that are read. NGROUPS_MAX (include/uapi/linux/limits.h) would be 65,536; a user
/// in more groups than this one has to use root.
const MAX_GROUPS: usize = 1024;
#[expect(clippy::cast_possible_truncation, reason = "four thousand")]
const GROUPS_LENGTH: libc::socklen_t = (MAX_GROUPS * size_of::<libc::gid_t>()) as libc::socklen_t;

/// Returns the supplementary groups of the other end (`SO_PEERGROUPS`, Linux 4.13 and later).
fn peer_groups(stream: &tokio::net::UnixStream) -> io::Result<Vec<Gid>> {
    let mut groups = [0 as libc::gid_t; MAX_GROUPS];
    let mut length = GROUPS_LENGTH;
    // SAFETY: pointer and length describe `groups`; the descriptor is open.
    let status = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    let count = length as usize / size_of::<libc::gid_t>();
    Ok(groups[..count.min(groups.len())].iter().map(|gid| Gid::from_raw(*gid)).collect())
}

async fn check_peer(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.permitted {
        next.run(request).await
    } else {
        let text = format!("only root and members of the group {GROUP} may use lbridge");
        (StatusCode::FORBIDDEN, Json(ApiError { code: ErrorCode::Failed, message: text })).into_response()
    }
}

async fn status(State(commands): State<mpsc::Sender<Command>>) -> Response {
    ask(&commands, Command::Status).await
}

async fn allow(
    State(commands): State<mpsc::Sender<Command>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: Result<Json<Allow>, JsonRejection>,
) -> Response {
    match body {
        Ok(Json(body)) => ask(&commands, |answer| Command::Allow(body, peer.uid, answer)).await,
        Err(rejection) => failure(ErrorCode::Usage, &rejection.body_text()),
    }
}

async fn deny(
    State(commands): State<mpsc::Sender<Command>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: Result<Json<Deny>, JsonRejection>,
) -> Response {
    match body {
        Ok(Json(body)) => ask(&commands, |answer| Command::Deny(body, peer.uid, answer)).await,
        Err(rejection) => failure(ErrorCode::Usage, &rejection.body_text()),
    }
}

async fn reload(State(commands): State<mpsc::Sender<Command>>) -> Response {
    ask(&commands, Command::Reload).await
}

async fn explain(
    State(commands): State<mpsc::Sender<Command>>,
    body: Result<Json<Question>, JsonRejection>,
) -> Response {
    match body {
        Ok(Json(body)) => ask(&commands, |answer| Command::Explain(body, answer)).await,
        Err(rejection) => failure(ErrorCode::Usage, &rejection.body_text()),
    }
}

fn events(news: &EventBus) -> Response {
    let Some(lines) = news.subscribe() else {
        return failure(ErrorCode::Failed, "events have too many subscribers already; end one of them");
    };
    let body = Body::from_stream(lines.map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

async fn ask<T: serde::Serialize>(
    commands: &mpsc::Sender<Command>,
    command: impl FnOnce(oneshot::Sender<Result<T, ApiError>>) -> Command,
) -> Response {
    let (sender, answer) = oneshot::channel();
    if commands.send(command(sender)).await.is_err() {
        return failure(ErrorCode::Failed, "the daemon is about to stop");
    }
    match answer.await {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(error)) => failure(error.code, &error.message),
        Err(_) => failure(ErrorCode::Failed, "the daemon is about to stop"),
    }
}

fn failure(code: ErrorCode, message: &str) -> Response {
    let status = match code {
        ErrorCode::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorCode::Usage => StatusCode::BAD_REQUEST,
        ErrorCode::Conflict => StatusCode::CONFLICT,
        ErrorCode::NoSuchRule => StatusCode::NOT_FOUND,
    };
    (status, Json(ApiError { code, message: message.to_owned() })).into_response()
}
