use lexico::shown::{shown, shown_message};

/// What keeps a server from starting, or ends it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {host}:{port}: {reason}", host = shown(host))]
    Listen {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// A setting that cannot be.
    #[error("{setting}: {reason}", reason = shown_message(reason))]
    Setting {
        /// The setting, as the command line names it.
        setting: &'static str,
        /// Why not, and what helps.
        reason: String,
    },
    /// The model could not be loaded.
    #[error(transparent)]
    Load(Box<dyn std::error::Error + Send + Sync>),
    /// The model cannot be served.
    #[error(transparent)]
    Model(#[from] lexico_llm::Error),
    /// The operating system gives no more threads, or takes the connections away.
    #[error("the server cannot go on: {0}")]
    System(#[from] std::io::Error),
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;
