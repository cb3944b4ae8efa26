//! Real processes of the services, on free ports, that are really killed.
#![allow(clippy::print_stderr, reason = "what the services say belongs to a failed test's output")]

use std::io::{BufRead, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use unmask::local::{Gateway, gateway};
use unmask::tls::ClientTlsArgs;
use unmask_proto::v1::admin_service_client::AdminServiceClient;
use unmask_proto::v1::{GetStatusRequest, ListModelsRequest, ModelStatus, WorkerState};

/// Bounds every wait: far beyond what anything takes.
pub const LIMIT: Duration = Duration::from_secs(60);

pub fn model() -> String {
    folder("tests/golden/sdar")
}

/// A folder of the repository.
pub fn folder(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    path.to_str().unwrap().to_owned()
}

/// A running service.
pub struct Process {
    child: Child,
    /// host:port it listens on.
    pub address: String,
}

impl Process {
    /// Starts `unmask ARGUMENTS --listen ADDRESS` and waits until it says where it listens.
    pub fn start(arguments: &[&str], listen: &str) -> Process {
        let mut child = Command::new(env!("CARGO_BIN_EXE_unmask"))
            .args(arguments)
            .args(["--listen", listen])
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "error".into()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("{arguments:?} ended")).unwrap();
            eprintln!("{line}");
            if let Some((_, address)) = line.split_once(" listens on ") {
                break address.to_owned();
            }
        };
        // Somebody must read on, or the service stops when the pipe is full.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                eprintln!("{line}");
            }
        });
        Process { child, address }
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Waits until it has ended well by itself.
    pub fn ended(mut self) {
        let begin = std::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(begin.elapsed() < LIMIT, "the process ends");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.address.clone()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Controllers on one store, gateways and workers.
pub struct Cluster {
    pub controllers: Vec<Process>,
    pub gateways: Vec<Process>,
    pub workers: Vec<Process>,
    /// Folder of what workers serve that are started from now on.
    pub model: String,
    /// host:port of every controller, also of those that were killed.
    control: String,
    store: String,
    _data: TempDir,
}

impl Cluster {
    /// Starts everything, with one controller on a store of its own, and waits until all workers serve through all
    /// gateways.
    pub async fn start(gateways: usize, workers: usize) -> Cluster {
        let data = tempfile::tempdir().unwrap();
        let store = format!("embedded:{}", data.path().join("store").display());
        Cluster::on(data, store, 1, gateways, workers).await
    }

    async fn on(data: TempDir, store: String, controllers: usize, gateways: usize, workers: usize) -> Cluster {
        let mut cluster = Cluster {
            controllers: Vec::new(),
            gateways: Vec::new(),
            workers: Vec::new(),
            model: model(),
            control: String::new(),
            store,
            _data: data,
        };
        for _ in 0..controllers {
            cluster.start_controller("127.0.0.1:0");
        }
        let addresses: Vec<_> = cluster.controllers.iter().map(|controller| controller.address.clone()).collect();
        cluster.control = addresses.join(",");
        for _ in 0..gateways {
            cluster.gateways.push(cluster.gateway("127.0.0.1:0"));
        }
        for _ in 0..workers {
            cluster.workers.push(cluster.worker("127.0.0.1:0"));
        }
        for gateway in 0..gateways {
            cluster.serving(gateway, workers as u32).await;
        }
        cluster
    }

    pub fn start_controller(&mut self, listen: &str) {
        self.controllers.push(Process::start(&["controller", "--store", &self.store], listen));
    }

    pub fn gateway(&self, listen: &str) -> Process {
        Process::start(&["gateway", "--controller", &self.control], listen)
    }

    pub fn worker(&self, listen: &str) -> Process {
        self.worker_at(listen, &["--controller", &self.control])
    }

    /// A worker with other arguments beside the usual ones.
    pub fn worker_with(&self, arguments: &[&str]) -> Process {
        self.worker_at("127.0.0.1:0", &[&self.control_unless(arguments)[..], arguments].concat())
    }

    /// Where the controllers are, unless `arguments` say.
    fn control_unless(&self, arguments: &[&str]) -> Vec<&str> {
        if arguments.contains(&"--controller") { Vec::new() } else { vec!["--controller", &self.control] }
    }

    fn worker_at(&self, listen: &str, arguments: &[&str]) -> Process {
        let worker = ["worker", "--model", &self.model, "--threads", "1", "--dtype", "f32"];
        Process::start(&[&worker[..], arguments].concat(), listen)
    }

    /// A worker that serves what it is assigned.
    pub fn pooled(&self, name: &str) -> Process {
        self.pooled_with(name, &[])
    }

    /// As [`Cluster::pooled`], with other arguments beside the usual ones.
    pub fn pooled_with(&self, name: &str, arguments: &[&str]) -> Process {
        let worker = ["worker", "--pool", "--threads", "1", "--worker-id", name];
        Process::start(&[&worker[..], &self.control_unless(arguments), arguments].concat(), "127.0.0.1:0")
    }

    /// Runs `unmask apply` on a file's text, and waits until all groups serve.
    pub fn apply(&self, groups: &str) {
        self.apply_as("f32", groups);
    }

    /// As [`Cluster::apply`], with weights of another type.
    pub fn apply_as(&self, dtype: &str, groups: &str) {
        let yaml = format!("name: m\npath: {}\ndtype: {dtype}\n{groups}", model());
        let mut child = Command::new(env!("CARGO_BIN_EXE_unmask"))
            .args(["apply", "-f", "-", "--wait", "--limit-s", "60", "--controller", &self.control])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{yaml}");
    }

    /// How it stands with the pool's only model, as the first controller sees it.
    pub async fn placed(&self) -> ModelStatus {
        let controller = format!("http://{}", self.controllers[0].address);
        let mut client = AdminServiceClient::connect(controller).await.unwrap();
        client.get_status(GetStatusRequest {}).await.unwrap().into_inner().models.remove(0)
    }

    pub fn client(&self, number: usize) -> Gateway {
        gateway(&self.gateways[number].address, &ClientTlsArgs::default()).unwrap()
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.gateways.iter().map(|gateway| gateway.address.clone()).collect()
    }

    /// The epoch in which the first controller has a worker; 0 when it does not serve.
    pub async fn epoch(&self, worker: &str) -> u64 {
        let controller = format!("http://{}", self.controllers[0].address);
        let mut client = AdminServiceClient::connect(controller).await.unwrap();
        let members = client.get_status(GetStatusRequest {}).await.unwrap().into_inner().members;
        let serves = |member: &&unmask_proto::v1::Member| {
            member.endpoint == worker && member.connected && member.state() == WorkerState::Ready
        };
        members.iter().find(serves).map_or(0, |member| member.epoch)
    }

    /// Starts a worker that was killed, and waits until it serves in an epoch after `epoch`. That a gateway has so many
    /// groups would not do: one that was just killed may still be among them.
    pub async fn restart_worker(&mut self, address: &str, epoch: u64) {
        self.workers.push(self.worker(address));
        let serving = async {
            while self.epoch(address).await <= epoch {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, serving).await.expect("the worker serves again");
        for gateway in 0..self.gateways.len() {
            self.serving(gateway, self.workers.len() as u32).await;
        }
    }

    /// Waits until a gateway has so many groups.
    pub async fn serving(&self, gateway: usize, groups: u32) {
        let mut client = self.client(gateway);
        let serving = async {
            loop {
                let models = client.list_models(ListModelsRequest {}).await.map(|m| m.into_inner().models);
                if models.is_ok_and(|models| models.iter().map(|model| model.ready_groups).sum::<u32>() == groups) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, serving).await.expect("the groups serve");
    }
}

/// A real etcd of one member.
#[cfg(feature = "etcd")]
pub struct Etcd {
    child: Child,
    data: TempDir,
    /// Of clients and of peers.
    ports: [u16; 2],
}

#[cfg(feature = "etcd")]
impl Etcd {
    fn spawn(data: &TempDir, ports: [u16; 2]) -> Child {
        let [clients, peers] = ports.map(|port| format!("http://127.0.0.1:{port}"));
        Command::new("etcd")
            .args(["--name", "one", "--log-level", "error", "--data-dir"])
            .arg(data.path())
            .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
            .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
            .args(["--initial-cluster", &format!("one={peers}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (Debian: apt-get install etcd-server)")
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn restart(&mut self) {
        self.child = Etcd::spawn(&self.data, self.ports);
    }
}

#[cfg(feature = "etcd")]
impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(feature = "etcd")]
impl Cluster {
    /// Two controllers on a real etcd.
    pub async fn replicated(gateways: usize, workers: usize) -> (Etcd, Cluster) {
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (data, ports) = (tempfile::tempdir().unwrap(), [free(), free()]);
        let etcd = Etcd { child: Etcd::spawn(&data, ports), data, ports };
        let listens = async {
            while tokio::net::TcpStream::connect(("127.0.0.1", ports[0])).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, listens).await.expect("etcd starts");
        let store = format!("etcd://127.0.0.1:{}", ports[0]);
        let cluster = Cluster::on(tempfile::tempdir().unwrap(), store, 2, gateways, workers).await;
        (etcd, cluster)
    }
}
