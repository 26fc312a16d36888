"""Clients of memcached, against the gateway: via_memcached.py CLIENT PORT PID, where PID is a node to kill."""
import asyncio
import os
import signal
import socket
import sys

name, port, pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def kill():
    os.kill(pid, signal.SIGKILL)


def pymemcache():
    from pymemcache.client.base import Client
    from pymemcache.exceptions import MemcacheClientError, MemcacheServerError
    from pymemcache.serde import pickle_serde

    client = Client(("127.0.0.1", port), timeout=20, default_noreply=False)
    assert client.set("tea", "green") and client.get("tea") == b"green"
    assert client.set_many({"a": 1, "b": 2}) == [] and client.get_many(["a", "b", "c"]) == {"a": b"1", "b": b"2"}
    assert not client.add("tea", "black") and client.add("milk", "white")
    assert client.replace("milk", "oat") and not client.replace("honey", "x")
    assert client.append("milk", "s") and client.prepend("milk", "g") and client.get("milk") == b"goats"
    value, unique = client.gets("milk")
    assert client.cas("milk", "cow", unique) and client.cas("milk", "x", unique) is False
    assert client.cas("honey", "x", unique) is None and set(client.gets_many(["milk", "tea"])) == {"milk", "tea"}
    assert client.delete("milk") and not client.delete("milk") and client.delete_many(["a", "b"])
    assert client.set_multi({"a": 1}) == [] and client.get_multi(["a"]) == {"a": b"1"} and client.delete_multi(["a"])
    assert client.raw_command("get tea", "END\r\n") == b"VALUE tea 0 5\r\ngreen\r\n"
    kill()
    assert client.set("cups", "10") and client.incr("cups", 5) == 15 and client.decr("cups", 20) == 0
    assert client.incr("nothing", 1) is None and client.touch("cups", 100) and not client.touch("nothing", 1)
    assert client.set("gone", "x", expire=-1) and client.get("gone", "default") == "default"
    assert client.version().startswith(b"1.6") and b"version" in client.stats()
    try:
        client.incr("tea", 1)
        raise AssertionError("tea was counted")
    except MemcacheClientError:
        pass
    try:
        client.set("large", "x" * (1 << 21))
        raise AssertionError("it is too large")
    except MemcacheServerError:
        pass
    assert client.get("tea") == b"green"
    quiet = Client(("127.0.0.1", port), timeout=20, serde=pickle_serde)  # answers are left out
    quiet.set("list", [1, {"two": 3.0}])
    assert quiet.get("list") == [1, {"two": 3.0}]
    quiet.flush_all()
    assert quiet.get("list") is None and client.get("tea") is None
    quiet.quit()


def pylibmc():
    from pylibmc import Client, NotFound, TooBig

    client = Client([f"127.0.0.1:{port}"], binary=False, behaviors={"cas": True, "tcp_nodelay": True})
    objects = {"text": "grün", "bytes": b"\xff\n", "int": 54, "bool": True, "list": [1, {"two": 3.0}]}
    for key, value in objects.items():
        assert client.set(key, value) and client.get(key) == value, key
    assert client.set_multi({"a": 1, "b": 2}) == [] and client.get_multi(["a", "b", "c"]) == {"a": 1, "b": 2}
    assert client.add("tea", "green") and not client.add("tea", "black")
    assert client.replace("tea", "black") and not client.replace("honey", "x")
    assert client.set("milk", b"oat") and client.append("milk", b"s") and client.prepend("milk", b"g")
    assert client.get("milk") == b"goats"
    kill()
    value, unique = client.gets("tea")
    assert client.cas("tea", "white", unique) and not client.cas("tea", "x", unique)
    assert client.set("cups", 10) and client.incr("cups") == 11 and client.incr("cups", 5) == 16
    assert client.decr("cups", 20) == 0 and client.get("cups") == 0
    try:
        client.incr("nothing")
        raise AssertionError("nothing was counted")
    except NotFound:
        pass
    assert client.set("short", 1, time=100) and client.touch("short", 200) and "short" in client
    assert client.delete("short") and not client.delete("short") and client.delete_multi(["a", "b"])
    try:
        client.set("large", b"x" * (1 << 21))
        raise AssertionError("it is too large")
    except TooBig:
        pass
    assert client.get("text") == "grün"
    assert client.get_stats()[0][1]["version"].startswith(b"1.6")
    assert client.flush_all() and client.get("text") is None


async def emcache():
    import emcache as library

    client = await library.create_client([library.MemcachedHostAddress("127.0.0.1", port)], timeout=20.0)
    await client.set(b"tea", b"green", flags=54, exptime=100)
    item = await client.gets(b"tea", return_flags=True)
    assert item.value == b"green" and item.flags == 54
    await client.cas(b"tea", b"black", item.cas)
    kill()
    assert (await client.get(b"tea")).value == b"black" and await client.get(b"milk") is None
    await client.add(b"milk", b"oat")
    await client.append(b"milk", b"s")
    await client.prepend(b"milk", b"g")
    found = await client.get_many([b"tea", b"milk", b"honey"])
    assert {key: item.value for key, item in found.items()} == {b"tea": b"black", b"milk": b"goats"}
    await client.set(b"cups", b"10")
    assert await client.increment(b"cups", 5) == 15 and await client.decrement(b"cups", 20) == 0
    await client.touch(b"cups", 100)
    assert (await client.gat(100, b"cups")).value.strip() == b"0"
    await client.delete(b"cups")
    assert await client.get(b"cups") is None
    await client.close()


def meta_memcache():
    from meta_memcache import CacheClient, Key, ServerAddress, connection_pool_factory_builder
    from meta_memcache.configuration import LeasePolicy, RecachePolicy, StalePolicy
    from meta_memcache.protocol import SetMode

    client = CacheClient.cache_client_from_servers(
        servers=[ServerAddress("127.0.0.1", port)],
        connection_pool_factory_fn=connection_pool_factory_builder(recv_timeout=20),
    )
    assert client.set("tea", "green", ttl=100) and client.get("tea") == "green"
    for key, value in {"bytes": b"\xff\n", "int": 54, "list": [1, {"two": 3.0}]}.items():
        assert client.set(key, value, ttl=100) and client.get(key) == value, key
    found = client.multi_get([Key("tea"), Key("int"), Key("nothing")])
    assert found == {Key("tea"): "green", Key("int"): 54, Key("nothing"): None}, found
    assert not client.set("tea", "black", ttl=100, set_mode=SetMode.ADD)
    kill()
    assert not client.set("tea", "white", ttl=100, cas_token=5)  # it reads no cas unique above 2^32
    assert client.set("tea", "black", ttl=100)
    assert not client.delta("cups", delta=5)
    assert client.delta_initialize("cups", delta=5, initial_value=10, initial_ttl=100)
    assert client.delta_and_get("cups", delta=5) == 15 and client.delta_and_get("cups", delta=-20) == 0
    assert client.touch("tea", ttl=200) and client.get("tea", touch_ttl=10) == "black"
    assert client.get("tea", recache_policy=RecachePolicy(ttl=50)) is None  # this one makes it anew
    assert client.get("tea", recache_policy=RecachePolicy(ttl=50)) == "black"
    assert client.invalidate("tea", stale_policy=StalePolicy(mark_stale_on_deletion_ttl=30))
    assert client.get("tea") is None and client.get("tea") == "black"
    assert client.get_or_lease("rare", lease_policy=LeasePolicy()) is None
    assert client.set("rare", "x", ttl=10) and client.get_or_lease("rare", lease_policy=LeasePolicy()) == "x"
    assert client.set(Key("ключ"), "x", ttl=10) and client.get(Key("ключ")) == "x"
    assert client.set(Key("k" * 300), "x", ttl=10) and client.get(Key("k" * 300)) == "x"
    assert client.delete("tea") and client.get("tea") is None


def queue():
    """A queue of tasks instead of the gateway, with producers and workers in processes of their own."""
    from multiprocessing import Process, SimpleQueue

    from pymemcache.client.base import Client

    def client():
        return Client(("127.0.0.1", port), timeout=60, default_noreply=False)

    def produce(producer, tasks):
        mine = client()
        for task in range(tasks):
            assert mine.set("tasks", f"{producer} {task}")

    def work(worker, given):
        mine, task = client(), b""
        while task != b"stop":
            task = mine.get("tasks")
            given.put((worker, task))

    tasks, several, given = 2500, range(4), SimpleQueue()
    producers = [Process(target=produce, args=(n, tasks)) for n in several]
    workers = [Process(target=work, args=(n, given), daemon=True) for n in several]
    for process in producers + workers:
        process.start()
    lists = {worker: [] for worker in several}
    for count in range(tasks * len(several)):
        if count == tasks:
            kill()
        worker, task = given.get()
        lists[worker].append(tuple(int(number) for number in task.split()))
    for process in producers:
        process.join()
        assert process.exitcode == 0
    assert sorted(sum(lists.values(), [])) == [(n, task) for n in several for task in range(tasks)]
    for worker, mine in lists.items():
        for n in several:
            of_one = [task for producer, task in mine if producer == n]
            assert of_one == sorted(of_one), f"worker {worker}, producer {n}"
    for worker in workers:
        client().set("tasks", "stop")
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


if name != "queue":
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"flush_all\r\n")
        assert connection.makefile().readline() == "OK\n", "every story begins with no keys"
story = globals()[name]()
if name == "emcache":
    asyncio.run(story)
