//! Processes that end with the test, and runs of leasectl.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long a test waits for a condition before it fails. Nothing here takes this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the path of the daemon's program. The program belongs to another package, so cargo
/// builds it here. If all tests of the workspace run, it is up to date already; if only these tests
/// run, a stale one is rebuilt.
fn daemon_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let profile = Path::new(env!("CARGO_BIN_EXE_leasectl")).parent().and_then(Path::file_name).unwrap();
        let profile = if profile == "debug" { "dev".as_ref() } else { profile };
        let mut cargo = Command::new(env!("CARGO"));
        // Cargo sets these variables for the test's own package. Passed on, they would make the
        // build scripts of other packages run again.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let package_variables = [
                "CARGO_PKG_",
                "CARGO_MANIFEST_",
                "CARGO_BIN_",
                "CARGO_CRATE_",
                "CARGO_PRIMARY_",
                "CARGO_TARGET_TMPDIR",
            ];
            if package_variables.iter().any(|prefix| name.starts_with(prefix)) {
                cargo.env_remove(name);
            }
        }
        let built = cargo
            .args(["test", "--workspace", "--locked", "--no-run", "--test", "process"])
            .args(["--message-format", "json", "--profile"])
            .arg(profile)
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let messages = String::from_utf8(built.stdout).unwrap();
        let mut programs = messages.lines().filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            let is_daemon = message["target"]["name"] == "leased" && message["target"]["kind"][0] == "bin";
            message["executable"].as_str().filter(|_| is_daemon).map(PathBuf::from)
        });
        programs.next_back().unwrap()
    })
}

/// A daemon with the embedded store.
pub(crate) struct Daemon {
    process: Process,
    folder: TempDir,
    options: Vec<String>,
    pub(crate) address: String,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a daemon with additional options.
    pub(crate) fn start_with(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        let (process, address) = Self::spawn(folder.path(), "127.0.0.1:0", &options);
        Self { process, folder, options, address }
    }

    fn spawn(folder: &Path, address: &str, options: &[String]) -> (Process, String) {
        let mut command = Command::new(daemon_program());
        command.args(["--http-listen=off", "--listen", address]).args(options).current_dir(folder);
        command.env_remove("LEASED_MONGODB_URI").stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::create(folder.join("log")).unwrap());
        let mut process = Process::spawn(&mut command);
        let mut ready = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let address = ready.split_whitespace().find_map(|word| word.strip_prefix("grpc="));
        let log = || std::fs::read_to_string(folder.join("log")).unwrap();
        let address = address.unwrap_or_else(|| panic!("the daemon does not start: {}", log()));
        (process, address.to_owned())
    }

    /// Kills the daemon.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Kills the daemon, and starts it again at the same address and with the same data.
    pub(crate) fn restart(&mut self) {
        self.process.kill();
        (self.process, _) = Self::spawn(self.folder.path(), &self.address, &self.options);
    }

    /// Stops the daemon with SIGSTOP. On return none of its threads runs.
    pub(crate) fn stop(&self) {
        self.process.stop();
    }

    /// Continues the stopped daemon.
    pub(crate) fn go_on(&self) {
        self.process.signal(Signal::CONT);
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns leasectl's command with these arguments, for this daemon.
    pub(crate) fn leasectl(&self, arguments: &[&str]) -> Command {
        let mut command = leasectl(arguments);
        command.env("LEASED_ENDPOINT", self.url());
        command
    }

    /// Runs leasectl with these arguments to its end.
    pub(crate) fn end(&self, arguments: &[&str]) -> Ended {
        end(&mut self.leasectl(arguments))
    }

    /// Runs leasectl with these arguments, which must succeed, and returns its JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let ended = self.end(&[&["--output=json"], arguments].concat());
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        serde_json::from_str(&ended.stdout).unwrap()
    }

    /// Waits until the state of `key` fulfils the condition.
    pub(crate) fn until_key(&self, key: &str, condition: impl Fn(&Value) -> bool) {
        until(|| self.is_key(key, &condition));
    }

    /// Returns whether the state of `key` fulfils the condition now.
    pub(crate) fn is_key(&self, key: &str, condition: impl Fn(&Value) -> bool) -> bool {
        let ended = self.end(&["--output=json", "get", key]);
        ended.code == Some(0) && condition(&serde_json::from_str(&ended.stdout).unwrap())
    }
}

/// The path of leasectl.
pub(crate) const LEASECTL: &str = env!("CARGO_BIN_EXE_leasectl");

/// Returns leasectl's command with these arguments. It has no settings in its environment and
/// ignores no signal; a test run in the background or under nohup ignores some.
pub(crate) fn leasectl(arguments: &[&str]) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(LEASECTL).args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("LEASED_") {
            command.env_remove(name);
        }
    }
    command
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code, unless a signal ended the process.
    pub(crate) code: Option<i32>,
    /// The signal that ended the process, if one did.
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end.
pub(crate) fn end(command: &mut Command) -> Ended {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (code, signal) = (output.status.code(), output.status.signal());
    Ended { code, signal, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A process that is killed when this value is dropped.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Stops the process with SIGSTOP. On return it is stopped, or has already ended.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
        until(|| matches!(state(self.pid()), Some('T' | 'Z')));
    }

    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// Returns the lines of the process's piped standard output.
    pub(crate) fn lines(&mut self) -> impl Iterator<Item = String> + use<> {
        BufReader::new(self.0.stdout.take().unwrap()).lines().map(Result::unwrap)
    }

    /// Waits for the end of the process. Returns its exit code and what it wrote to piped outputs.
    pub(crate) fn end(mut self) -> Ended {
        until(|| !self.is_running());
        let status = self.0.wait().unwrap();
        let (code, signal) = (status.code(), status.signal());
        let mut ended = Ended { code, signal, stdout: String::new(), stderr: String::new() };
        if let Some(mut stdout) = self.0.stdout.take() {
            stdout.read_to_string(&mut ended.stdout).unwrap();
        }
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_string(&mut ended.stderr).unwrap();
        }
        ended
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Waits until the condition is true.
pub(crate) fn until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it did not happen in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the state of a process as ps(1) shows it, such as `T` for stopped and `Z` for ended.
/// `None` if there is no such process.
pub(crate) fn state(pid: Pid) -> Option<char> {
    let output = Command::new("ps").args(["-o", "state=", "-p", &pid.to_string()]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().chars().next()
}

/// Waits until the file has at least this many lines, and returns all its lines.
pub(crate) fn lines(path: &Path, at_least: usize) -> Vec<String> {
    let read = || std::fs::read_to_string(path).unwrap_or_default();
    until(|| read().matches('\n').count() >= at_least);
    read().lines().map(ToOwned::to_owned).collect()
}

/// Waits until a process has written its id to this file, and returns the id.
pub(crate) fn pid_in(path: &Path) -> Pid {
    lines(path, 1)[0].parse().ok().and_then(Pid::from_raw).unwrap()
}
