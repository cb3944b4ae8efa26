//! A network of hosts in namespaces, with links that go down, lose, and delay. Everything is in namespaces of the test's
//! own, that of its processes included: when it ends, however it ends, the kernel takes all of it away, and runs side
//! by side do not see each other.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

/// Set where a test runs in namespaces of its own.
const INSIDE: &str = "UNMASK_CHAOS_INSIDE";
/// Ways to get them: as root, and as anybody where the kernel lets anybody.
const WAYS: [&[&str]; 2] = [&[], &["--map-root-user"]];
const UNSHARE: [&str; 6] = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
/// All that [`Network::new`] needs.
const PROBE: &str = "mount -t tmpfs none /run && ip link add hub type bridge && \
    ip netns add probe && ip link add port type veth peer name eth0 netns probe && nsenter --net=/run/netns/probe true";
/// Where packets to a host go that is cut off: nobody has it, and nobody says so.
const NOWHERE: &str = "02:00:00:00:00:ff";

/// Runs `body` in namespaces of its own, by running this test once more in them. Where there are none to be had, says so
/// and does nothing.
pub fn isolated(test: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let mut why = String::new();
    let way = WAYS.into_iter().find(|way| {
        let probe = Command::new("unshare").args(*way).args(UNSHARE).args(["sh", "-c", PROBE]).output();
        match probe {
            Ok(output) if output.status.success() => return true,
            Ok(output) => why = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "),
            Err(error) => why = format!("unshare: {error}"),
        }
        false
    });
    let Some(way) = way else {
        println!("{test} is skipped: no network namespaces here ({why})");
        return;
    };
    let mut inside = Command::new("unshare")
        .args(way)
        .args(UNSHARE)
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--include-ignored", "--nocapture"])
        .env(INSIDE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    for line in BufReader::new(inside.stdout.take().unwrap()).lines().map_while(Result::ok) {
        println!("{line}");
    }
    let status = inside.wait().unwrap();
    assert!(status.success(), "{test} failed in its namespaces: {status}");
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn tc(arguments: &str) -> bool {
    Command::new("tc").args(arguments.split(' ')).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Hosts 1, 2, ... on one switch; this process is at the switch itself.
pub struct Network {
    /// What makes a link bad.
    slow: &'static str,
}

impl Network {
    pub fn new(hosts: usize) -> Network {
        assert!(Command::new("mount").args(["-t", "tmpfs", "none", "/run"]).status().unwrap().success());
        ip("link set lo up");
        ip("link add hub type bridge");
        ip("address add 10.77.0.254/24 dev hub");
        ip("link set hub up");
        for host in 1..=hosts {
            ip(&format!("netns add h{host}"));
            ip(&format!("link add port{host} type veth peer name eth0 netns h{host}"));
            ip(&format!("link set port{host} master hub up"));
            ip(&format!("-n h{host} link set lo up"));
            ip(&format!("-n h{host} address add {}/24 dev eth0", Network::address(host)));
            ip(&format!("-n h{host} link set eth0 up"));
        }
        // A queue that overflows loses and delays too, where the kernel has no better.
        let ways = ["netem delay 40ms 20ms loss 5%", "tbf rate 400kbit burst 3000 latency 60ms"];
        let slow = ways.into_iter().find(|way| tc(&format!("qdisc add dev port1 root {way}")));
        tc("qdisc del dev port1 root");
        let slow = slow.unwrap_or_else(|| {
            println!("slow links are left out: this kernel has neither netem nor tbf");
            ""
        });
        Network { slow }
    }

    /// What a slow link is; empty where there can be none.
    pub fn slowness(&self) -> &'static str {
        self.slow
    }

    pub fn address(host: usize) -> String {
        format!("10.77.0.{host}")
    }

    /// A program, to be run on a host. Its process is the program's: nothing stands between.
    pub fn on(host: usize, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args([&format!("--net=/run/netns/h{host}"), program]);
        command
    }

    pub fn link(&self, host: usize, up: bool) {
        ip(&format!("link set port{host} {}", if up { "up" } else { "down" }));
    }

    /// Packets of one host to another are lost, until they are not.
    pub fn cut(&self, from: usize, to: usize, cut: bool) {
        let to = Network::address(to);
        if cut {
            ip(&format!("-n h{from} neighbour replace {to} lladdr {NOWHERE} dev eth0 nud permanent"));
        } else {
            ip(&format!("-n h{from} neighbour delete {to} dev eth0"));
        }
    }

    /// Packets to and from a host are late, and some are lost.
    pub fn slow(&self, host: usize, slow: bool) {
        for (namespace, device) in [(String::new(), format!("port{host}")), (format!("-n h{host} "), "eth0".into())] {
            let change =
                if slow { format!("add dev {device} root {}", self.slow) } else { format!("del dev {device} root") };
            assert!(tc(&format!("{namespace}qdisc {change}")), "tc {namespace}qdisc {change}");
        }
    }
}
