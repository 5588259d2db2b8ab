//! The owner's label when none is given: who, where, and which process.

/// `USER@HOST:PID`, for people who look at a key.
pub(crate) fn label() -> String {
    // Cron sets one, some shells the other; a container may set neither.
    let user = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    let user = user.filter(|user| !user.is_empty());
    let user = user.unwrap_or_else(|| format!("uid{}", rustix::process::getuid().as_raw()));
    let system = rustix::system::uname();
    let suffix = format!("@{}:{}", system.nodename().to_string_lossy(), std::process::id());
    // An owner has up to 256 bytes.
    let user: String = user.chars().take(64).collect();
    user + &suffix
}
