//! The default owner label: user, host and process.

/// Returns `USER@HOST:PID`.
pub(crate) fn label() -> String {
    // Cron sets one of these, some shells the other, and a container may set neither.
    let user = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    let user = user.filter(|user| !user.is_empty());
    let user = user.unwrap_or_else(|| format!("uid{}", rustix::process::getuid().as_raw()));
    let system = rustix::system::uname();
    let suffix = format!("@{}:{}", system.nodename().to_string_lossy(), std::process::id());
    // Cuts the user's name, because an owner label has at most 256 bytes.
    let user: String = user.chars().take(64).collect();
    user + &suffix
}
