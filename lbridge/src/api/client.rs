//! client: the CLI's end of the control API.

use std::{
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::protocol::{
    ALLOW, Allow, ApiError, DENY, Deny, EVENTS, EXPLAIN, Event, RELOAD, Reloaded, RuleStatus, STATUS, Status,
};
use crate::planning::explain::{Explanation, Question};

/// Maximum wait for an answer. The largest possible change, 131,072 rules, takes some seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The ways in which a request to the daemon can fail.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon accepts connections at the socket.
    #[error(
        "no lbridge daemon at {}: {error}; `systemctl start lbridge`, or `lbridge run` as root; \
         `lbridge doctor` says more",
        path.display()
    )]
    Unreachable {
        /// The path of the control socket.
        path: PathBuf,
        /// The error that connect() returned.
        error: io::Error,
    },
    /// The socket's permissions do not admit this user.
    #[error("{} may be used by root and the group lbridge only; use sudo", path.display())]
    Forbidden {
        /// The path of the control socket.
        path: PathBuf,
    },
    /// The daemon accepted the request, but did not answer in time.
    #[error("the daemon at {} does not answer; its log may say why", path.display())]
    Silent {
        /// The path of the control socket.
        path: PathBuf,
    },
    /// The daemon's answer is an error.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The daemon ended while its events were followed.
    #[error("the daemon at {} has ended", path.display())]
    Ended {
        /// The path of the control socket.
        path: PathBuf,
    },
    /// The daemon accepted the request, but ended without an answer.
    #[error(
        "the daemon at {} ended before it answered; once it runs again `lbridge status` says what is in \
         force",
        path.display()
    )]
    Unanswered {
        /// The path of the control socket.
        path: PathBuf,
    },
    /// The daemon's answer could not be parsed; holds the reason.
    #[error("could not parse the daemon's answer: {0}; is the daemon of this version?")]
    Garbled(String),
}

/// A client of the daemon at a Unix socket.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// Creates a client for the daemon that listens at `path`. Does not connect yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Returns the path of the daemon's control socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fetches the daemon's whole status.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.request::<(), _>(Method::GET, STATUS, None).await
    }

    /// Returns the daemon's process id, as the kernel reports it; `None` if it is unknown or in another pid
    /// namespace.
    pub async fn daemon(&self) -> Option<u32> {
        let peer = UnixStream::connect(&self.path).await.ok()?.peer_cred().ok()?;
        // A process in another pid namespace has no id here.
        u32::try_from(peer.pid()?).ok().filter(|pid| *pid != 0)
    }

    /// Adds rules; returns their status after the change.
    pub async fn allow(&self, allow: &Allow) -> Result<Vec<RuleStatus>, ClientError> {
        self.request(Method::POST, ALLOW, Some(allow)).await
    }

    /// Removes rules; returns their status before the change.
    pub async fn deny(&self, deny: &Deny) -> Result<Vec<RuleStatus>, ClientError> {
        self.request(Method::POST, DENY, Some(deny)).await
    }

    /// Makes the daemon read its configuration again; returns the changes.
    pub async fn reload(&self) -> Result<Reloaded, ClientError> {
        self.request::<(), _>(Method::POST, RELOAD, None).await
    }

    /// Asks what would happen to a connection.
    pub async fn explain(&self, question: &Question) -> Result<Explanation, ClientError> {
        self.request(Method::POST, EXPLAIN, Some(question)).await
    }

    /// Calls `event` for each event from now on, until it returns `Break`.
    pub async fn follow<B>(&self, mut event: impl FnMut(Event) -> ControlFlow<B>) -> Result<B, ClientError> {
        let sent = tokio::time::timeout(ANSWER_TIMEOUT, self.send::<()>(Method::GET, EVENTS, None));
        let response = sent.await.unwrap_or_else(|_| Err(ClientError::Silent { path: self.path.clone() }))?;
        let succeeded = response.status().is_success();
        let mut body = response.into_body();
        if !succeeded {
            return Err(refusal(&body.collect().await.map_err(|e| self.broken_off(&e))?.to_bytes()));
        }
        let mut rest = vec![];
        // The connection breaks off if the daemon is killed.
        while let Some(Ok(frame)) = body.frame().await {
            rest.extend_from_slice(&frame.into_data().unwrap_or_default());
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = rest.drain(..=end).collect();
                let happened = serde_json::from_slice(&line).map_err(|e| garbled(&e))?;
                if let ControlFlow::Break(outcome) = event(happened) {
                    return Ok(outcome);
                }
            }
        }
        Err(ClientError::Ended { path: self.path.clone() })
    }

    async fn request<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        resource: &str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.exchange(method, resource, body));
        answer.await.unwrap_or_else(|_| Err(ClientError::Silent { path: self.path.clone() }))
    }

    async fn exchange<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        resource: &str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let response = self.send(method, resource, body).await?;
        let succeeded = response.status().is_success();
        let answer = response.into_body().collect().await.map_err(|e| self.broken_off(&e))?.to_bytes();
        if succeeded {
            serde_json::from_slice(&answer).map_err(|e| garbled(&e))
        } else {
            Err(refusal(&answer))
        }
    }

    /// Sends a request; returns the response, without its body.
    async fn send<B: Serialize>(
        &self,
        method: Method,
        resource: &str,
        body: Option<&B>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { path: self.path.clone() },
            _ => ClientError::Unreachable { path: self.path.clone(), error },
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken_off(&e))?;
        tokio::spawn(connection);
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| garbled(&e))?,
            None => vec![],
        };
        let request = Request::builder()
            .method(method)
            .uri(resource)
            .header(header::HOST, "lbridge")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| garbled(&e))?;
        sender.send_request(request).await.map_err(|e| self.broken_off(&e))
    }

    /// Converts a connection error: the answer was not HTTP, or the connection ended.
    fn broken_off(&self, error: &hyper::Error) -> ClientError {
        if error.is_parse() { garbled(error) } else { ClientError::Unanswered { path: self.path.clone() } }
    }
}

fn garbled(error: &dyn std::fmt::Display) -> ClientError {
    ClientError::Garbled(error.to_string())
}

/// Parses the body of an answer whose status is not a success.
fn refusal(answer: &[u8]) -> ClientError {
    serde_json::from_slice::<ApiError>(answer).map_or_else(|e| garbled(&e), ClientError::Api)
}
