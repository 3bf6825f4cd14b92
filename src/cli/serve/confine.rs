//! What the server gives up once it has started: `--confine` and `--user`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use memdev::confine::{Confinement, Mode, Needs, Report, User};
use memdev::net::Listener;
use memdev::worker::ServerConfig;
use memdev::{Error, Result};

#[derive(Args, Debug)]
#[command(next_help_heading = "Confinement")]
pub(super) struct ConfineArgs {
    /// What the server gives up once it has started: all it can, all or nothing at all, nothing
    ///
    /// It can then open no files but those in the images' directories, run no programs, make no connections and gain no
    /// rights, and leaves no core files. With `auto` it says in one line what this kernel cannot enforce; with `require`
    /// it does not start then. `off` is for debugging.
    #[arg(long, value_name = "auto|require|off", value_enum, default_value_t, hide_possible_values = true)]
    confine: When,

    /// Become USER once the TCP addresses are open (only root can)
    ///
    /// A name or a number; its groups are those of the user, with GROUP as the first if given. The user must be able to
    /// read the images, and unix sockets are made by it, in directories that it may write to.
    #[arg(long, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// Kill the server for any system call that is not on the list
    #[arg(long, hide = true)]
    confine_strict: bool,

    /// Let processes of the same user look into the server
    #[arg(long, hide = true)]
    confine_traceable: bool,
}

/// When something that a system may not have is done.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum When {
    #[default]
    Auto,
    Require,
    Off,
}

impl ConfineArgs {
    /// What was asked for, with the user looked up.
    pub(super) fn confinement(&self) -> Result<Confinement> {
        Ok(Confinement {
            mode: match self.confine {
                When::Auto => Mode::Auto,
                When::Require => Mode::Require,
                When::Off => Mode::Off,
            },
            user: self.user.as_deref().map(User::look_up).transpose()?,
            strict: self.confine_strict,
            traceable: self.confine_traceable,
        })
    }
}

/// Listens on a unix socket. Its file belongs to who makes it, and is removed in the end by who the server is then.
pub(super) fn bind_unix(path: &Path, mode: u32, confinement: &Confinement) -> Result<Listener> {
    match &confinement.user {
        Some(user) => user
            .act(|| Listener::bind_unix_with(path, mode))?
            .map_err(|error| Error::new(error.kind(), format!("{error} (as user {user})"))),
        None => Listener::bind_unix_with(path, mode),
    }
}

/// What this server has to get at as long as it runs, or once, where it has sockets whose files it is to remove.
pub(super) fn needs(config: &ServerConfig, unwanted: &[Listener]) -> Needs {
    // An image whose path cannot be made absolute cannot be opened either, and that is said when it is tried.
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let listeners = config.listeners.iter().chain(&config.control).chain(unwanted);
    Needs {
        images: config.images.iter().map(|(_, path)| absolute(path)).collect(),
        sockets: listeners.filter_map(Listener::file).map(Path::to_owned).collect(),
    }
}

/// Says what is missing; and what is not, to who wants to know.
pub(super) fn say(report: &Report) {
    if let Some(missing) = report.missing() {
        tracing::warn!("Not fully confined: {missing}");
    }
    tracing::info!("Confined to {report}");
}
