// libpqxx, for C++: connection::cancel_query() from another thread.
#include <iostream>
#include <string>
#include <thread>

#include <pqxx/pqxx>

int
main(int, char **argv)
{
	pqxx::connection session(argv[1]);
	std::thread thread([&session] {
		std::string line;

		std::getline(std::cin, line);
		session.cancel_query();
	});

	try
	{
		pqxx::nontransaction(session).exec("select pg_sleep(600)");
	}
	catch (const pqxx::sql_error &error)
	{
		std::cout << "query: " << error.sqlstate() << std::endl;
	}
	thread.join();
	std::cout << "answer: " << pqxx::nontransaction(session).exec("select 6 * 7")[0][0].c_str() << std::endl;
}
